"""Plans as text: a heat map of nodes and experts, and a table that compares policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from placement.certificate import Certificate
from placement.plan import Plan

_SHADES = ("··", "░░", "▒▒", "▓▓", "██")
_MOST_NODES, _MOST_EXPERTS = 64, 48
_SHOWN_LOSSES = (1, 2, 3, 4)


def heat_map(plan: Plan, *, layer: int = 0) -> str:
    """Draw one layer of a plan as text: a row per node, a column per expert.

    A cell is shaded by the node's share of the expert's tokens. Large plans are cut.
    """
    experts = min(plan.num_experts, _MOST_EXPERTS)
    nodes = min(plan.num_nodes, _MOST_NODES)
    shares = plan.node_shares[layer]
    member = plan.node_member[layer]
    lines = [" " * 10 + "".join(f"{f'e{e}':>5}" for e in range(experts))]
    for node in range(nodes):
        cells = "".join(
            f"{_shade(float(shares[e, node])) if member[e, node] else '':>5}"
            for e in range(experts)
        )
        lines.append(f"{f'node {plan.node_ids[node]}':>10}{cells}".rstrip())
    cut = []
    if plan.num_layers > 1:
        cut.append(f"layer {layer} of {plan.num_layers}")
    if experts < plan.num_experts or nodes < plan.num_nodes:
        cut.append(f"{nodes} of {plan.num_nodes} nodes, {experts} of {plan.num_experts} experts")
    legend = "share of the expert's tokens: ·· < 10 %  ░░ < 25 %  ▒▒ < 50 %  ▓▓ < 75 %  ██ more"
    lines.append(" " * 10 + "   ".join([legend, *cut]))
    return "\n".join(lines)


def _shade(share: float) -> str:
    return _SHADES[sum(share >= edge for edge in (0.1, 0.25, 0.5, 0.75))]


def comparison(rows: Sequence[tuple[str, Certificate]], *, bold: bool) -> str:
    """Draw a table with a row per (policy name, certificate) pair.

    The best value of each column is bold, or starred if not ``bold``.
    """
    losses = [k for k in _SHOWN_LOSSES if k in rows[0][1].survival]
    head = f"{'policy':<12}" + "".join(f"{f'survive {k}':>12}" for k in losses)
    lines = [head + f"{'max/mean':>12}{'distinct':>10}"]
    best = {k: max(c.survival[k] for _, c in rows) for k in losses}
    level = min(c.max_over_mean for _, c in rows)
    for name, found in rows:
        cells = "".join(
            _cell(f"{found.survival[k]:.1%}", found.survival[k] >= best[k] - 5e-5, bold, 12)
            for k in losses
        )
        cells += _cell(f"{found.max_over_mean:.3f}", found.max_over_mean <= level + 5e-4, bold, 12)
        lines.append(f"{name:<12}{cells}{found.min_distinct_nodes:>10}")
    return "\n".join(lines)


def _cell(text: str, best: bool, bold: bool, width: int) -> str:
    if best and bold:
        return " " * (width - len(text)) + f"\033[1m{text}\033[0m"
    return f"{text + ('*' if best else ' '):>{width}}"


def wants_bold(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return whether to print bold: ``stream`` is a terminal and ``NO_COLOR`` is not set."""
    return stream.isatty() and not environment.get("NO_COLOR")

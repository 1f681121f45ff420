"""Results as a text table, and the main findings in a line each. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lazarus.basics.format import bytes_text, count_text, seconds_text
from lazarus.simulate.rows import Row

_STALL_S = 0.5  # stalls shorter than that are not printed
_SCALES = 0.8  # of the smallest fleet's throughput per node; below that a size does not scale


def table(rows: Sequence[Row], *, price: float | None = None) -> list[str]:
    """Return a table with a line per row.

    Args:
        rows: Results, at least one.
        price: Price of one node for one hour; adds a column with the cost of a billion tokens.
    """
    wide = max(len("scenario"), *(len(row.scenario) for row in rows))
    cost = "" if price is None else f" {'per Gtok':>9}"
    lines = [
        f"{'scenario':{wide}} {'policy':14} {'tok/s':>8} {'ETTR':>6} {'lost':>6} {'rec. s':>7} "
        f"{'step s':>7} {'PLT %':>6} {'state':>9}{cost}  stalls"
    ]
    for row in rows:
        stalls = "  ".join(
            f"{k} {seconds_text(v)}" for k, v in row.stall_s.items() if v >= _STALL_S
        )
        cost = "" if price is None else f" {_text(cost_of(row, price)):>9}"
        lines.append(
            f"{row.scenario:{wide}} {row.policy[:14]:14} "
            f"{count_text(row.goodput_tokens_per_s):>8} {row.ettr:6.3f} {row.steps_lost:6d} "
            f"{row.recovery_median_s:7.2f} {row.step_s_at_start:7.3f} {row.plt * 100:6.2f} "
            f"{bytes_text(row.state_bytes_per_node):>9}{cost}  {stalls}"
        )
    return lines


def cost_of(row: Row, price: float) -> float:
    """Return the cost of a billion committed tokens, given the price of one node for one hour."""
    return price * row.node_hours / (row.tokens / 1e9) if row.tokens else float("inf")


def findings(rows: Sequence[Row], *, price: float | None = None) -> list[str]:
    """Return lines on the fastest setting, on scaling with size, and (with a price) on cost."""
    ours = [row for row in rows if row.slots_per_node]
    lines = []
    if len({(row.slots_per_node, row.min_replicas) for row in ours}) > 1:
        best = max(ours, key=lambda row: row.goodput_tokens_per_s)
        lines.append(
            f"most tokens/s: {best.scenario} ({best.policy}), "
            f"{bytes_text(best.state_bytes_per_node)} of training state a node"
        )
    for policy in dict.fromkeys(row.policy for row in rows):
        lines += _scaling(policy, [row for row in rows if row.policy == policy])
    if price is not None:
        cheapest = min(rows, key=lambda row: cost_of(row, price))
        lines.append(
            f"cheapest: {cheapest.scenario} ({cheapest.policy}), {_text(cost_of(cheapest, price))} "
            f"for a billion tokens, {price * cheapest.node_hours:,.0f} for "
            f"{cheapest.node_hours:,.0f} node hours"
        )
    return lines


def _scaling(policy: str, rows: Sequence[Row]) -> list[str]:
    """A line on throughput per node relative to the smallest fleet, and where scaling stops."""
    best: dict[int, float] = {}
    for row in rows:
        each = row.goodput_tokens_per_s / row.num_nodes
        best[row.num_nodes] = max(each, best.get(row.num_nodes, 0.0))
    if len(best) < 2:
        return []
    sizes = sorted(best)
    part = {size: best[size] / best[sizes[0]] if best[sizes[0]] else 0.0 for size in sizes}
    shown = ", ".join(f"{size} nodes {part[size]:.0%}" for size in sizes)
    limit = next(((a, b) for a, b in pairwise(sizes) if part[b] < _SCALES), None)
    end = "scales to the largest" if limit is None else f"stops between {limit[0]} and {limit[1]}"
    return [f"{policy}: tokens/s per node: {shown}; {end} (at {_SCALES:.0%})"]


def _text(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"

"""Assign nodes to template positions if nodes differ in rack, zone or hazard.

A block should span as many racks or zones as it can, and should not consist of weak nodes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from placement.templates.template import Template

_MOST_SWAPPED = 64
_PASSES = 8


def ordered_template(
    template: Template,
    *,
    num_nodes: int,
    domains: Sequence[int | str] = (),
    hazards: Sequence[float] = (),
) -> Template:
    """Return the template with nodes assigned so that its blocks are at low risk.

    Nodes are assigned to positions alternating between domains; then pairs of nodes are swapped
    while that lowers the sum of ``block_risk``. Without domains and hazards the template is
    returned unchanged.
    """
    if not len(domains) and not len(hazards):
        return template
    return on_nodes(
        template, improved_order(template, _dealt(num_nodes, domains), domains, hazards)
    )


def on_nodes(template: Template, node_at: Sequence[int]) -> Template:
    """Return the template with every position p replaced by node ``node_at[p]``."""
    return tuple(
        (tuple(sorted(node_at[p] for p in positions)), width) for positions, width in template
    )


def improved_order(
    template: Template,
    node_at: Sequence[int],
    domains: Sequence[int | str],
    hazards: Sequence[float],
) -> list[int]:
    """Return ``node_at`` after swaps that lower the blocks' risk; unchanged beyond 64 nodes."""
    better = list(node_at)
    if len(better) <= _MOST_SWAPPED and (len(domains) or len(hazards)):
        _swap(template, better, domains, hazards)
    return better


def _dealt(num_nodes: int, domains: Sequence[int | str]) -> list[int]:
    """Nodes in an order that alternates between domains, the largest domain first."""
    if not len(domains):
        return list(range(num_nodes))
    groups: dict[int | str, list[int]] = {}
    for node in range(num_nodes):
        groups.setdefault(domains[node], []).append(node)
    queues = sorted(groups.values(), key=lambda g: (-len(g), g[0]))
    order: list[int] = []
    while len(order) < num_nodes:
        order += [queue.pop(0) for queue in queues if queue]
    return order


def block_risk(
    nodes: Sequence[int], domains: Sequence[int | str], hazards: Sequence[float]
) -> float:
    """Return the risk of a block: chance that all its nodes fail, plus a penalty for few domains.

    The chance is the product of the nodes' hazards; the penalty is 0.25 ** (number of domains).
    """
    risk = 0.0
    if len(hazards):
        risk += prod(hazards[n] for n in nodes)
    if len(domains):
        risk += 0.25 ** len({domains[n] for n in nodes})
    return risk


def _swap(
    template: Template,
    node_at: list[int],
    domains: Sequence[int | str],
    hazards: Sequence[float],
) -> None:
    """Swap pairs of positions, in place, as long as a swap lowers the risk."""
    blocks_of = [
        [b for b, (nodes, _) in enumerate(template) if p in nodes] for p in range(len(node_at))
    ]

    def risk(blocks: set[int]) -> float:
        return sum(
            block_risk([node_at[p] for p in template[b][0]], domains, hazards) for b in blocks
        )

    for _ in range(_PASSES):
        improved = False
        for a in range(len(node_at)):
            for b in range(a):
                touched = set(blocks_of[a]) ^ set(blocks_of[b])
                if not touched:
                    continue
                before = risk(touched)
                node_at[a], node_at[b] = node_at[b], node_at[a]
                if risk(touched) < before - 1e-15:
                    improved = True
                else:
                    node_at[a], node_at[b] = node_at[b], node_at[a]
        if not improved:
            return

"""Core node sets after a change of nodes: repairs the nodes of each block of a template.

All node positions are those of the new request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from placement.request import Bools, Ints
from placement.templates.template import Template

Risk = Callable[[Sequence[int]], float]
"""What a block on some nodes risks, such as ``order.block_risk``; smaller is safer."""


def no_risk(nodes: Sequence[int]) -> float:
    """The risk of a block if all nodes are alike: always 0."""
    return 0.0


def repaired_blocks(
    old: Sequence[tuple[tuple[int, ...], int]],
    *,
    joiners: Sequence[int],
    held_BN: npt.NDArray[np.int64],
    slots_per_node: int,
    floor: int,
    risk: Risk = no_risk,
) -> Template | None:
    """Add nodes to the surviving blocks until each has at least ``floor`` nodes.

    First, each joiner goes to the smallest block where its slots allow; ties: largest reduction of
    risk, then hottest block. Then every block below the floor gets a node with free core slots, or
    else a node of one of the largest blocks: the node that leaves the least total risk, then the
    node that already holds most replicas of the block's experts.

    Args:
        old: Surviving nodes and width of each block; a block may have no nodes left.
        joiners: New nodes, in no block yet.
        held_BN: Number of replicas of block b's experts on node n, summed over layers, [B, N].
        slots_per_node: Slots of a node; the widths of its blocks may not exceed them.
        floor: Fewest nodes of a block.
        risk: Risk of a block from the racks and hazards of its nodes.

    Returns:
        The repaired template; None if the floor cannot be reached.
    """
    width = [w for _, w in old]
    nodes = [set(n) for n, _ in old]
    num_nodes = held_BN.shape[1]
    used = [0] * num_nodes
    for block_width, held in zip(width, nodes, strict=True):
        for n in held:
            used[n] += block_width

    def of(block: int, *, more: int = -1, less: int = -1) -> float:
        return 0.0 if risk is no_risk else risk(sorted((nodes[block] | {more}) - {-1, less}))

    def gain(block: int, joiner: int) -> float:
        return of(block) - of(block, more=joiner) if nodes[block] else 0.0

    for joiner in joiners:
        blocks = range(len(nodes))
        for block in sorted(blocks, key=lambda b: (len(nodes[b]), -gain(b, joiner), -b)):
            if used[joiner] + width[block] <= slots_per_node:
                nodes[block].add(joiner)
                used[joiner] += width[block]
    for block in sorted(range(len(nodes)), key=lambda b: (len(nodes[b]), b)):
        while len(nodes[block]) < floor:
            found = _offers(nodes, width, used, block, floor=floor, slots=slots_per_node)
            if not found:
                return None
            # Rounded so that ranks agree even if their sums differ in the last bit.
            donor, node = min(
                found,
                key=lambda o: (
                    round(of(block, more=o[1])
                          + (of(o[0], less=o[1]) - of(o[0]) if o[0] >= 0 else 0.0), 12),
                    -int(held_BN[block, o[1]]), used[o[1]], -o[0], o[1],
                ),
            )  # fmt: skip
            if donor >= 0:
                nodes[donor].discard(node)
                used[node] -= width[donor]
            nodes[block].add(node)
            used[node] += width[block]
    return tuple((tuple(sorted(n)), w) for n, w in zip(nodes, width, strict=True))


def _offers(
    nodes: Sequence[set[int]],
    width: Sequence[int],
    used: Sequence[int],
    needy: int,
    *,
    floor: int,
    slots: int,
) -> list[tuple[int, int]]:
    """(donor block, node) pairs that block ``needy`` may take.

    Nodes with free core slots (donor -1) if there are any; else nodes of the largest blocks above
    the floor.
    """
    own = width[needy]
    free = [n for n, u in enumerate(used) if n not in nodes[needy] and u + own <= slots]
    if free:
        return [(-1, n) for n in free]
    able = [b for b in range(len(nodes)) if b != needy and len(nodes[b]) > floor]
    most = max((len(nodes[b]) for b in able), default=0)
    return [
        (b, n)
        for b in able
        if len(nodes[b]) == most
        for n in sorted(nodes[b] - nodes[needy])
        if used[n] - width[b] + own <= slots
    ]


def unconfined_blocks(
    template: Template,
    *,
    domain_of_node: Sequence[int | str],
    held_BN: npt.NDArray[np.int64],
    slots_per_node: int,
) -> Template:
    """Exchange nodes between blocks so that fewer blocks lie within a single rack or zone.

    A block within a single domain is lost if that domain fails. As long as an exchange of one of
    its nodes for a node outside the block reduces the number of such blocks, the exchange that
    moves the fewest replicas is made.

    Args:
        template: Blocks on the nodes of the new request.
        domain_of_node: Rack or zone of each node; if empty, the template is returned unchanged.
        held_BN: Number of replicas of block b's experts on node n, summed over layers, [B, N].
        slots_per_node: Slots of a node.
    """
    if len(set(domain_of_node)) < 2:
        return template
    blocks = [set(nodes) for nodes, _ in template]
    width = [w for _, w in template]

    def confined(nodes: set[int]) -> bool:
        return len({domain_of_node[n] for n in nodes}) < 2

    for _ in range(len(blocks)):
        used = [0] * len(domain_of_node)
        for nodes, w in zip(blocks, width, strict=True):
            for n in nodes:
                used[n] += w
        best: tuple[tuple[int, ...], tuple[int, int, int, int]] | None = None
        for a in (i for i, block in enumerate(blocks) if confined(block)):
            for b, out, come in _exchanges(blocks, a, len(domain_of_node)):
                if b >= 0:
                    theirs = (blocks[b] - {come}) | {out}
                    if confined(theirs) and not confined(blocks[b]):
                        continue
                    change = width[a] - width[b]
                else:
                    change = width[a]
                if confined((blocks[a] - {out}) | {come}) or used[come] + change > slots_per_node:
                    continue
                if b >= 0 and used[out] - change > slots_per_node:
                    continue
                kept = int(held_BN[a, come]) - int(held_BN[a, out])
                kept += int(held_BN[b, out]) - int(held_BN[b, come]) if b >= 0 else 0
                order = ((-kept, a, b, out, come), (a, b, out, come))
                best = order if best is None else min(best, order)
        if best is None:
            break
        a, b, out, come = best[1]
        blocks[a] = (blocks[a] - {out}) | {come}
        if b >= 0:
            blocks[b] = (blocks[b] - {come}) | {out}
    return tuple((tuple(sorted(n)), w) for n, w in zip(blocks, width, strict=True))


def _exchanges(blocks: Sequence[set[int]], a: int, num_nodes: int) -> list[tuple[int, int, int]]:
    """All exchanges as (other block or -1, node that leaves block a, node that enters)."""
    found = []
    outside = [n for n in range(num_nodes) if n not in blocks[a]]
    for out in sorted(blocks[a]):
        found += [(-1, out, come) for come in outside]
        for b in range(len(blocks)):
            if b != a and out not in blocks[b]:
                found += [(b, out, come) for come in outside if come in blocks[b]]
    return found


def held_by_block(member: Bools, block_LE: Ints, num_blocks: int) -> npt.NDArray[np.int64]:
    """Count the replicas of each block's experts on each node, over all layers; int64 [B, N]."""
    num_nodes = member.shape[2]
    row_M, node_M = np.divmod(np.flatnonzero(member), num_nodes)
    block_M = block_LE.reshape(-1)[row_M]
    cell_M = (block_M.astype(np.int64) * num_nodes + node_M)[block_M >= 0]
    held = np.bincount(cell_M, minlength=num_blocks * num_nodes).astype(np.int64, copy=False)
    return held.reshape(num_blocks, num_nodes)


def core_member(template: Template, block_LE: Ints, *, num_nodes: int) -> Bools:
    """Return the core, bool [L, E, N]: the nodes of each expert's block."""
    nodes_BN = np.zeros((len(template), num_nodes), dtype=np.bool_)
    for row, (nodes, _) in enumerate(template):
        nodes_BN[row, list(nodes)] = True
    return nodes_BN[block_LE]

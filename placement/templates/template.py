"""Templates: core node sets that all layers share, and candidates for templates.

A template is a list of blocks (nodes, width), coldest experts first: in every layer, every node of
the first block holds the ``width`` coldest experts, and so on. These replicas are the core; further
replicas are the fill. The joint survival of all layers is then at least that of the blocks,
independent of loads, fill and the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from placement.request import Floats, Ints
from placement.survival.bitmasks import mask_of

Block = tuple[tuple[int, ...], int]
Template = tuple[Block, ...]


def segments(sizes: Sequence[int], widths: Sequence[int]) -> Template:
    """Return blocks on disjoint runs of consecutive nodes."""
    blocks, start = [], 0
    for size, width in zip(sizes, widths, strict=True):
        blocks.append((tuple(range(start, start + size)), width))
        start += size
    return tuple(blocks)


def wrap(replicas: Sequence[int], *, num_nodes: int, first_node: int = 0) -> Template:
    """Return blocks that lay replicas out over the nodes cyclically; equal sets are merged."""
    blocks: list[Block] = []
    position = 0
    for count in replicas:
        here = range(position, position + min(count, num_nodes))
        nodes = tuple(sorted(first_node + p % num_nodes for p in here))
        position += len(here)
        if blocks and blocks[-1][0] == nodes:
            blocks[-1] = (nodes, blocks[-1][1] + 1)
        else:
            blocks.append((nodes, 1))
    return tuple(blocks)


def even_widths(num_experts: int, groups: int) -> tuple[int, ...]:
    """Divide ``num_experts`` into ``groups`` parts that differ by at most 1, smaller ones first."""
    small, bigger = divmod(num_experts, groups)
    return (small,) * (groups - bigger) + (small + 1,) * bigger


def masks(template: Template) -> tuple[int, ...]:
    """Return the node set of each block as a bitmask."""
    return tuple(mask_of(nodes) for nodes, _ in template)


def block_of_rank(template: Template) -> Ints:
    """Return the block of the coldest, second coldest, ... expert, int32 [E]."""
    widths = [width for _, width in template]
    return np.repeat(np.arange(len(template), dtype=np.int32), widths)


def segment_candidates(
    profile_E: Floats, *, num_nodes: int, slots_per_node: int, floor: int
) -> tuple[Template, ...]:
    """Return templates of disjoint segments that vary in number and in the size of hot segments.

    Args:
        profile_E: Load shares from ``load_profile``, coldest expert first, summing to 1.
        num_nodes: Number of nodes, N.
        slots_per_node: Slots per node.
        floor: Fewest nodes of a block.
    """
    num_experts = len(profile_E)
    found: dict[Template, None] = {}
    fewest, most = -(-num_experts // slots_per_node), min(num_nodes // floor, num_experts)
    for groups in _spread(fewest, most):
        widths = even_widths(num_experts, groups)
        ends = np.cumsum(widths)
        weight = np.array([profile_E[e - w : e].sum() for e, w in zip(ends, widths, strict=True)])
        for tilt in (0.0, 0.25, 0.5, 1.0):
            sizes = proportional_sizes(weight**tilt, total=num_nodes, floor=floor)
            if sum(s * w for s, w in zip(sizes, widths, strict=True)) <= num_nodes * slots_per_node:
                found[segments(sizes, widths)] = None
    return tuple(found)


def _spread(first: int, last: int) -> tuple[int, ...]:
    """A few integers from ``first`` to ``last``, denser at the low end."""
    if last - first < 6:
        return tuple(range(first, last + 1))
    steps = (1.0, 1.1, 1.25, 1.5, 2.0)
    return tuple(sorted({min(last, int(np.ceil(first * s))) for s in steps}))


def proportional_sizes(weight: Floats, *, total: int, floor: int) -> tuple[int, ...]:
    """Divide ``total`` nodes into ascending parts >= ``floor``, roughly proportional to weights."""
    spare = total - floor * len(weight)
    scale = weight.sum()
    share = weight / scale if scale > 0 else np.full(len(weight), 1.0 / len(weight))
    ideal = np.maximum(share * total - floor, 0.0)
    ideal *= spare / ideal.sum() if ideal.sum() > 0 else 0.0
    extra: Ints = np.floor(ideal + 1e-12).astype(np.int32)
    missing = spare - int(extra.sum())
    # The hotter, later segment wins a tie.
    order = np.lexsort((-np.arange(len(weight)), extra - ideal))
    for turn in range(missing):
        extra[order[turn % len(weight)]] += 1
    return tuple(sorted(int(floor + x) for x in extra))

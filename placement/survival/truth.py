"""Exact counts by truth tables in big integers, for any node sets on at most 20 nodes.

Bit b of a table stands for the set of dead nodes given by the bits of b.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

MAX_NODES = 20


@lru_cache(maxsize=32)
def dead_tables(num_nodes: int) -> tuple[int, ...]:
    """Return, for each node, the table of the dead sets that contain the node."""
    size = 1 << num_nodes
    tables = []
    for node in range(num_nodes):
        width = 1 << node
        table, span = ((1 << width) - 1) << width, 2 * width
        while span < size:
            table |= table << span
            span *= 2
        tables.append(table)
    return tuple(tables)


@lru_cache(maxsize=32)
def level_tables(num_nodes: int) -> tuple[int, ...]:
    """Return, for each k = 0..N, the table of the dead sets with k nodes."""
    levels = [1]
    for node in range(num_nodes):
        shift = 1 << node
        levels = [
            (levels[k] if k < len(levels) else 0) | (levels[k - 1] << shift if k else 0)
            for k in range(len(levels) + 1)
        ]
    return tuple(levels)


def fatal_table(masks: Sequence[int], *, num_nodes: int) -> int:
    """Return the table of the dead sets that contain at least one of the node sets."""
    dead = dead_tables(num_nodes)
    fatal = 0
    for mask in masks:
        term = -1
        while mask:
            low = mask & -mask
            term &= dead[low.bit_length() - 1]
            mask ^= low
        fatal |= term
    return fatal


def surviving_counts(masks: Sequence[int], *, num_nodes: int) -> tuple[int, ...]:
    """Count, for k = 0..N, the dead sets of k nodes that contain none of the node sets."""
    fatal = fatal_table(masks, num_nodes=num_nodes)
    return tuple(level.bit_count() - (fatal & level).bit_count()
                 for level in level_tables(num_nodes))  # fmt: skip

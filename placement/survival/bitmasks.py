"""Bitmask helpers shared by the exact probability methods.

A node set is a Python integer whose bit i stands for node i. A plan survives a set of dead nodes if
no expert's node set is a subset of the dead nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from placement.request import Bools


def mask_of(nodes: Iterable[int]) -> int:
    """Return a node set as a bitmask."""
    mask = 0
    for node in nodes:
        mask |= 1 << int(node)
    return mask


def nodes_of(mask: int) -> tuple[int, ...]:
    """Return the nodes of a bitmask, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


def minimal_sets(member: Bools) -> tuple[int, ...]:
    """Return the inclusion-minimal node sets of all experts of all layers, by size, then value.

    Args:
        member: bool [..., N], one row per (layer, expert).
    """
    num_nodes = member.shape[-1]
    rows = np.packbits(member.reshape(-1, num_nodes), axis=1, bitorder="little")
    pad = -rows.shape[1] % 8
    if pad:
        rows = np.concatenate([rows, np.zeros((len(rows), pad), dtype=np.uint8)], axis=1)
    words = np.ascontiguousarray(rows).view("<u8")
    if words.shape[1] == 1:
        return minimal_masks(set(words[:, 0].tolist()))
    return _minimal_words(words)


def minimal_masks(masks: Iterable[int]) -> tuple[int, ...]:
    """Return the bitmasks that contain no other one of ``masks``, by size, then value."""
    kept: list[int] = []
    for mask in sorted(set(masks), key=lambda m: (m.bit_count(), m)):
        if not any(mask & core == core for core in kept):
            kept.append(mask)
    return tuple(kept)


def _minimal_words(words: npt.NDArray[np.uint64]) -> tuple[int, ...]:
    sizes = np.bitwise_count(words).sum(1)
    left = words[np.argsort(sizes, kind="stable")]
    kept: list[int] = []
    while len(left):
        core = left[0]
        kept.append(int.from_bytes(np.ascontiguousarray(core, dtype="<u8").tobytes(), "little"))
        inside = np.ones(len(left), dtype=np.bool_)
        for word in np.flatnonzero(core):
            inside &= (left[:, word] & core[word]) == core[word]
        left = left[~inside]
    return tuple(sorted(kept, key=lambda m: (m.bit_count(), m)))


def components(masks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Group sets so that no two groups share a node; groups are ordered by lowest node."""
    groups: list[tuple[int, list[int]]] = []
    for mask in masks:
        union, together = mask, [mask]
        apart = []
        for span, group in groups:
            if span & mask:
                union |= span
                together = group + together
            else:
                apart.append((span, group))
        groups = [*apart, (union, together)]
    groups.sort(key=lambda g: g[0] & -g[0])
    return tuple(tuple(sorted(g, key=lambda m: (m.bit_count(), m))) for _, g in groups)

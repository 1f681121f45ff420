"""The exhaustive optimum of the small placement problem: slow, obvious, exact at every k.

By the reduction to minimal sets a plan is a composition of the experts (ascending replicas) into
blocks, with one node set per block: no set contains another, a set is no larger than its first
expert's replicas, sizes do not fall, and no node carries more than its slots. All of those are
tried, up to renaming nodes that carry the same blocks and exchanging blocks of one size. Replica
vectors differ only in which sizes they allow, so one walk answers many of them at once; a branch
is left when, for every vector that allows it, it survives no k better than what is known.

Shapes: V vectors, E experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import numpy.typing as npt

from placement.survival.truth import dead_tables, level_tables

_Classes = tuple[tuple[int, tuple[int, ...]], ...]  # (slots used, nodes) of like nodes
_Shape = tuple[int, int]  # width and size of a block
_MOST_ORDERS = 24  # orders of like blocks that are compared for a canonical form


@dataclass(slots=True)
class _Search:
    limits: npt.NDArray[np.int64]
    slots: int
    dead: tuple[int, ...]
    levels: tuple[int, ...]
    best: npt.NDArray[np.int64]
    chosen: list[int] = field(default_factory=list)
    shapes: list[_Shape] = field(default_factory=list)
    seen: set[tuple[tuple[_Shape, ...], tuple[int, ...]]] = field(default_factory=set)


def best_counts(
    replicas: Sequence[int],
    *,
    num_nodes: int,
    slots_per_node: int,
    known: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """For each k the largest number of k-subsets of dead nodes that any plan survives.

    Args:
        replicas: Ascending; at most ``replicas[e]`` distinct nodes for expert e.
        num_nodes: N, at most 20 (in practice 9).
        slots_per_node: Experts per node.
        known: Counts of a known plan; only better branches are then followed.
    """
    one = None if known is None else [known]
    return best_counts_of_all(
        [replicas], num_nodes=num_nodes, slots_per_node=slots_per_node, known=one
    )[0]


def best_counts_of_all(
    vectors: Sequence[Sequence[int]],
    *,
    num_nodes: int,
    slots_per_node: int,
    known: Sequence[Sequence[int]] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """``best_counts`` of several replica vectors of one length, in a single walk.

    Args:
        vectors: V ascending vectors of E replica counts.
        known: Counts of a known plan for each vector.

    Raises:
        ValueError: A vector is not ascending, or has a count below 1.
    """
    for replicas in vectors:
        if list(replicas) != sorted(replicas) or replicas[0] < 1:
            raise ValueError(f"replicas must be ascending and >= 1, not {tuple(replicas)}")
    search = _Search(
        limits=np.array(vectors, dtype=np.int64),
        slots=slots_per_node,
        dead=dead_tables(num_nodes),
        levels=level_tables(num_nodes),
        best=np.full((len(vectors), num_nodes + 1), -1, dtype=np.int64),
    )
    if known is not None:
        search.best[:] = known
    _extend(search, 0, 0, ((0, tuple(range(num_nodes))),), np.arange(len(vectors)))
    return tuple(tuple(int(c) for c in row) for row in search.best)


def _extend(
    search: _Search, first: int, fatal: int, classes: _Classes, open_V: npt.NDArray[np.intp]
) -> None:
    """Try every block that may come next, for the vectors ``open_V`` that allow what is chosen."""
    num_experts = search.limits.shape[1]
    if first == num_experts:
        counts = np.array(_counts(search, fatal))
        search.best[open_V] = np.maximum(search.best[open_V], counts)
        return
    before = search.shapes[-1] if search.shapes else (num_experts, 1)
    for width in range(min(search.slots, num_experts - first), 0, -1):
        room = sum(len(nodes) for used, nodes in classes if used + width <= search.slots)
        # Blocks of one size may change places, so the wider comes first.
        least = before[1] if width <= before[0] else before[1] + 1
        most = min(int(search.limits[open_V, first].max()), room)
        for size in range(most, least - 1, -1):
            fit_V = open_V[search.limits[open_V, first] >= size]
            for mask, following in _choices(classes, width, size, search.slots):
                if not any(mask & old == old for old in search.chosen):
                    now = fatal | _term(search, mask)
                    _descend(search, (width, size), mask, now, first + width, following, fit_V)


def _descend(
    search: _Search,
    shape: _Shape,
    mask: int,
    fatal: int,
    first: int,
    classes: _Classes,
    fit_V: npt.NDArray[np.intp],
) -> None:
    better_V = (np.array(_counts(search, fatal)) > search.best[fit_V]).any(1)
    if not better_V.any():
        return
    search.chosen.append(mask)
    search.shapes.append(shape)
    key = _canonical(search)
    if key not in search.seen:
        search.seen.add(key)
        _extend(search, first, fatal, classes, fit_V[better_V])
    search.chosen.pop()
    search.shapes.pop()


def _canonical(search: _Search) -> tuple[tuple[_Shape, ...], tuple[int, ...]]:
    """The chosen blocks up to names of nodes and the order of the latest run of like blocks.

    The vectors open at a state are those that its shapes allow and that it can still improve, so
    a state met again has nothing new to say.
    """
    shapes = search.shapes
    start = len(shapes)
    while start and shapes[start - 1] == shapes[-1]:
        start -= 1
    columns = [0] * len(search.dead)
    for block, mask in enumerate(search.chosen):
        for node in range(len(columns)):
            columns[node] |= (mask >> node & 1) << block
    head = (1 << start) - 1
    least: tuple[int, ...] | None = None
    for turn, order in enumerate(permutations(range(start, len(shapes)))):
        if turn == _MOST_ORDERS:
            break
        moved = tuple(
            sorted((c & head) | sum((c >> b & 1) << start + i for i, b in enumerate(order))
                   for c in columns)
        )  # fmt: skip
        if least is None or moved < least:
            least = moved
    assert least is not None
    return tuple(shapes), least


def _term(search: _Search, mask: int) -> int:
    """The table of the dead sets that contain all nodes of ``mask``."""
    term = -1
    for node, table in enumerate(search.dead):
        if mask >> node & 1:
            term &= table
    return term


def _counts(search: _Search, fatal: int) -> list[int]:
    return [lv.bit_count() - (fatal & lv).bit_count() for lv in search.levels]


def _choices(
    classes: _Classes, width: int, size: int, slots: int
) -> Iterator[tuple[int, _Classes]]:
    """Ways to take ``size`` nodes, by how many come from each class of like nodes."""
    if not classes:
        if size == 0:
            yield 0, ()
        return
    (used, nodes), rest = classes[0], classes[1:]
    most = min(size, len(nodes)) if used + width <= slots else 0
    for take in range(most, -1, -1):
        mine = 0
        for node in nodes[:take]:
            mine |= 1 << node
        here: _Classes = ()
        if take:
            here += ((used + width, nodes[:take]),)
        if take < len(nodes):
            here += ((used, nodes[take:]),)
        for mask, others in _choices(rest, width, size - take, slots):
            yield mask | mine, here + others

"""Decide which rank saves each expert, and which nodes get copies. PURE.

Each expert is saved by one rank, however many replicas there are; each dense shard likewise. The
busiest writer limits the speed. Ties go to the lower rank, so all ranks compute the same split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Something that one rank must save: a sortable key, its bytes, the ranks that hold it."""

    key: tuple[int, ...]
    num_bytes: int
    holders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSplit:
    """The units that each rank saves."""

    units: tuple[tuple[Unit, ...], ...]

    def bytes_of_ranks(self) -> tuple[int, ...]:
        """Bytes that each rank saves."""
        return tuple(sum(u.num_bytes for u in own) for own in self.units)

    def bottleneck(self) -> int:
        """Bytes of the busiest rank."""
        return max(self.bytes_of_ranks(), default=0)

    def rank_of(self) -> dict[tuple[int, ...], int]:
        """The rank that saves each key."""
        return {u.key: rank for rank, own in enumerate(self.units) for u in own}


_Chooser = Callable[[Unit, Sequence[int]], int]


def split_unsharded(units: Iterable[Unit], *, num_ranks: int) -> WorkSplit:
    """Baseline: the lowest holder saves each unit, so rank 0 saves all the dense state.

    Source: the scheme the paper attributes to Megatron-DeepSpeed.
    """
    return _split(units, num_ranks, lambda unit, load: min(unit.holders))


def split_equally(units: Iterable[Unit], *, num_ranks: int) -> WorkSplit:
    """Full sharding: units in key order, each to the holder with the fewest units so far."""
    counts = [0] * num_ranks

    def fewest(unit: Unit, load: Sequence[int]) -> int:
        rank = min(unit.holders, key=lambda r: (counts[r], r))
        counts[rank] += 1
        return rank

    return _split(units, num_ranks, fewest)


def split_adaptively(
    units: Iterable[Unit], *, num_ranks: int, loaded: Sequence[int] = ()
) -> WorkSplit:
    """Adaptive sharding: largest unit first, each to its holder with the fewest bytes so far.

    Among units of equal size, those with fewer holders come first. ``loaded`` are the bytes that
    each rank has to save in addition.

    Source: MoC-System, adaptive data sharding (greedy by descending size).
    """
    ordered = sorted(units, key=lambda u: (-u.num_bytes, len(u.holders), u.key))
    return _split(ordered, num_ranks, lambda unit, load: _lightest(unit.holders, load), loaded)


def _lightest(ranks: Sequence[int], load: Sequence[int]) -> int:
    return min(ranks, key=lambda r: (load[r], r))


def _split(
    units: Iterable[Unit], num_ranks: int, choose: _Chooser, loaded: Sequence[int] = ()
) -> WorkSplit:
    own: list[list[Unit]] = [[] for _ in range(num_ranks)]
    load = list(loaded) or [0] * num_ranks
    for unit in units:
        if not unit.holders or max(unit.holders) >= num_ranks:
            raise ValueError(f"{unit.key} is held by {unit.holders} of {num_ranks} ranks")
        rank = choose(unit, load)
        own[rank].append(unit)
        load[rank] += unit.num_bytes
    return WorkSplit(units=tuple(tuple(sorted(u, key=lambda x: x.key)) for u in own))


def dense_shards(tensor_bytes: Mapping[str, int], *, num_ranks: int) -> tuple[tuple[str, ...], ...]:
    """Split the dense tensors over all ranks: largest first, each to the rank with fewest bytes.

    Returns:
        Sorted names per rank; a rank may get none.
    """
    load = [0] * num_ranks
    own: list[list[str]] = [[] for _ in range(num_ranks)]
    for name in sorted(tensor_bytes, key=lambda n: (-tensor_bytes[n], n)):
        rank = _lightest(range(num_ranks), load)
        own[rank].append(name)
        load[rank] += tensor_bytes[name]
    return tuple(tuple(sorted(names)) for names in own)


def copy_targets(
    units: Sequence[Unit],
    *,
    origin: Mapping[tuple[int, ...], int],
    nodes: Sequence[int],
    copies: int,
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Choose the nodes that keep a further host-memory copy of each snapshot.

    A node that holds the expert is never chosen (the copy would be lost together with a replica),
    nor the node that made the snapshot. The node with the fewest bytes so far comes first; among
    equals, the first after the origin in ring order. An expert that all nodes hold gets no copy.

    Args:
        units: Experts with their bytes; ``holders`` are the *nodes* that hold a live replica.
        origin: Node that snapshots each unit.
        nodes: All live nodes, ascending.
        copies: Copies per unit, >= 0.
    """
    load = dict.fromkeys(nodes, 0)
    position = {node: i for i, node in enumerate(nodes)}
    targets: dict[tuple[int, ...], tuple[int, ...]] = {}
    for unit in sorted(units, key=lambda u: (-u.num_bytes, -len(u.holders), u.key)):
        start = position[origin[unit.key]]
        allowed = [n for n in nodes if n not in unit.holders and n != origin[unit.key]]
        allowed.sort(key=lambda n: (load[n], (position[n] - start) % len(nodes)))
        targets[unit.key] = tuple(allowed[:copies])
        for node in targets[unit.key]:
            load[node] += unit.num_bytes
    return targets

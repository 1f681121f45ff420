"""Who saves what, and where copies go. PURE.

Each expert is saved once however many replicas it has, each dense shard once; the bottleneck is
the busiest writer. Ties go to the lower rank, so that every rank computes the same split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Something one rank must save: a key that sorts, its bytes, the ranks that hold it."""

    key: tuple[int, ...]
    num_bytes: int
    holders: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSplit:
    """Units per rank, and bytes per rank."""

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
    """The baseline: the lowest holder saves each unit, so rank 0 saves all the dense state.

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

    Units with few holders go first among equals: they have the least choice. ``loaded`` are
    bytes that each rank has to save besides.

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
    """Split the dense state's tensors over all ranks, largest first to the lightest.

    Returns:
        Names per rank, sorted; a rank may get none.
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
    """The nodes that keep a second host-memory copy of each snapshot.

    Never a node that holds the expert (its copy would die with the replica it stands in for),
    never the node that made the snapshot. The node with the fewest bytes so far is next; among
    equals the first after the origin in ring order. Where every node holds the expert, none.

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

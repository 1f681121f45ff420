"""Plan each rank's share of a save after a committed step. PURE.

Every rank computes the same result from state that is equal on all ranks (counts of committed
steps, the plan, the schedule), so all ranks start a snapshot at the same step without a message.
A rank that joins receives the ``SaveState`` with the rest of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.checkpoint.format.manifest import FROZEN, PARTS
from lazarus.checkpoint.selection.schedule import (
    ScheduleConfig,
    ScheduleState,
    Selection,
    parts_saved,
    select_experts,
)
from lazarus.checkpoint.selection.sharding import Unit, copy_targets, dense_shards, split_adaptively

Counts = NDArray[np.int64]
_WHOLE, _SINGLE, _FROZEN = range(3)  # records of all trained parts, of one of them, of the frozen


@dataclass(frozen=True, kw_only=True)
class SaveState:
    """The rotation's state and each expert's cumulative count of routed copies.

    ``routed_LE`` are the counts so far, ``snapshotted_LE`` those at each expert's last snapshot;
    both int64 [layers, experts], read-only.
    """

    schedule: ScheduleState
    routed_LE: Counts
    snapshotted_LE: Counts

    @classmethod
    def initial(cls, config: ScheduleConfig) -> SaveState:
        """The state before the first step."""
        zeros = np.zeros((config.num_layers, config.num_experts), dtype=np.int64)
        return cls(
            schedule=ScheduleState.initial(config), routed_LE=zeros, snapshotted_LE=zeros.copy()
        )

    def committed(self, counts_LE: NDArray[Any]) -> SaveState:
        """The state after a committed step that routed ``counts_LE`` copies (integers [L, E])."""
        return replace(self, routed_LE=self.routed_LE + counts_LE.astype(np.int64))

    def next_save(self, config: ScheduleConfig, *, step: int) -> tuple[Selection | None, SaveState]:
        """The selection to save after the commit of ``step``, and the state after the save.

        The selection is None if nothing is saved.
        """
        unsaved = (self.routed_LE - self.snapshotted_LE).tolist()
        chosen = select_experts(self.schedule, config, step=step, unsaved=unsaved)
        if chosen is None:
            return None, self
        selection, schedule = chosen
        saved = self.snapshotted_LE.copy()
        for layer, experts in enumerate(selection.snapshot):
            saved[layer, list(experts)] = self.routed_LE[layer, list(experts)]
        return selection, replace(self, schedule=schedule, snapshotted_LE=saved)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form, for journals, joiners and manifests."""
        return {
            "schedule": asdict(self.schedule),
            "routed": self.routed_LE.tolist(),
            "snapshotted": self.snapshotted_LE.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SaveState:
        """The inverse of ``to_json``."""
        return cls(
            schedule=ScheduleState(**data["schedule"]),
            routed_LE=np.array(data["routed"], dtype=np.int64),
            snapshotted_LE=np.array(data["snapshotted"], dtype=np.int64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOrder:
    """An expert that one rank has to snapshot.

    ``parts`` are the parts to save, ``persist`` says whether the record is written to storage,
    ``copy_nodes`` are the nodes that receive a copy.
    """

    layer: int
    expert: int
    parts: tuple[str, ...]
    persist: bool
    copy_nodes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """One rank's share of a save: experts, and names of the dense tensors in its shard."""

    experts: tuple[ExpertOrder, ...]
    dense_names: tuple[str, ...]


def plan_save(
    selection: Selection,
    *,
    ranks_of: Callable[[int, int], Sequence[int]],
    node_of_rank: Sequence[int],
    num_experts: int,
    part_bytes: Mapping[str, int],
    dense_bytes: Mapping[str, int],
    parts: str = "WO",
    copies: int = 1,
    layer_parts: Sequence[Sequence[str]] = (),
) -> tuple[RankShare, ...]:
    """Split a save over all ranks, so that each expert and each dense tensor is saved once.

    Args:
        selection: The experts to snapshot and to persist.
        ranks_of: Returns the ranks that hold (layer, expert), like ``Plan.ranks_of``.
        node_of_rank: Stable node id of each rank.
        num_experts: Experts per layer.
        part_bytes: Bytes of each part of one expert.
        dense_bytes: Bytes of each dense tensor; saved only when something is persisted.
        parts: ``WO``, ``W`` or ``O``, see ``ScheduleConfig``.
        copies: Copies of each snapshot on other nodes.
        layer_parts: The parts that the experts of each layer have; by default all are trained.
            Frozen parts are saved in full checkpoints alone, in files of their own.

    Returns:
        One share per rank. Ranks with fewer bytes of dense state get more experts.
    """
    orders = _orders(selection, num_experts=num_experts, parts=parts, layer_parts=layer_parts)
    num_ranks = len(node_of_rank)
    dense = dense_shards(dense_bytes if selection.persists else {}, num_ranks=num_ranks)
    units = [
        Unit(
            key=key,
            num_bytes=sum(part_bytes.get(p, 0) for p in orders[key][0]),
            holders=tuple(sorted(ranks_of(key[0], key[1]))),
        )
        for key in orders
    ]
    loaded = [sum(dense_bytes[n] for n in names) for names in dense]
    rank_of = split_adaptively(units, num_ranks=num_ranks, loaded=loaded).rank_of()
    snapshots = [
        replace(u, holders=tuple(sorted({node_of_rank[r] for r in u.holders})))
        for u in units
        if u.key[2] == _WHOLE
    ]
    targets = copy_targets(
        snapshots,
        origin={u.key: node_of_rank[rank_of[u.key]] for u in snapshots},
        nodes=sorted(set(node_of_rank)),
        copies=copies,
    )
    shares: list[list[ExpertOrder]] = [[] for _ in range(num_ranks)]
    for key, (saved, persist) in orders.items():
        order = ExpertOrder(
            layer=key[0],
            expert=key[1],
            parts=saved,
            persist=persist,
            copy_nodes=targets.get(key, ()),
        )
        shares[rank_of[key]].append(order)
    return tuple(
        RankShare(experts=tuple(own), dense_names=names)
        for own, names in zip(shares, dense, strict=True)
    )


def _orders(
    selection: Selection, *, num_experts: int, parts: str, layer_parts: Sequence[Sequence[str]]
) -> dict[tuple[int, ...], tuple[tuple[str, ...], bool]]:
    """Sorted (layer, expert, kind of record) -> (parts, persist)."""
    kept = parts_saved(selected=False, parts=parts)
    is_full = selection.is_full(num_experts)
    orders: dict[tuple[int, ...], tuple[tuple[str, ...], bool]] = {}
    for layer, snapshot in enumerate(selection.snapshot):
        persist = selection.persist[layer]
        own = layer_parts[layer] if layer_parts else PARTS
        if any(part in PARTS for part in own):
            for expert in snapshot:
                orders[layer, expert, _WHOLE] = (PARTS, expert in persist)
            if kept and selection.persists:
                for expert in sorted(set(range(num_experts)) - set(persist)):
                    orders[layer, expert, _SINGLE] = (kept, True)
        if FROZEN in own and is_full:
            for expert in range(num_experts):
                orders[layer, expert, _FROZEN] = ((FROZEN,), True)
    return dict(sorted(orders.items()))

"""Pure functions behind the decisions of a recovery: verdict, needed replicas, moves, slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lazarus.control.messages import Aligned, Move, Report, Seat, Vector
from lazarus.errors import BrokenInvariantError
from placement import InfeasiblePlacementError, Plan

Expert = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The step that every member must reach; ranks that are one behind apply ``vector``."""

    step: int
    vector: Vector | None = None


def verdict(
    reports: Mapping[str, Report], *, known: Mapping[int, Vector], published: int
) -> Verdict:
    """Decide whether the step in flight is committed (rule 19).

    Args:
        reports: Reports of all voting workers, by worker.
        known: Vectors received from any rank, by step, of step ``published`` and above.
        published: Step of the newest journaled commit.

    Returns:
        The highest step for which there is any evidence, with its vector if known.

    Raises:
        BrokenInvariantError: The members cannot all reach this step.
    """
    vectors = dict(known)
    said = {id(report): report for report in reports.values()}.values()  # each object once
    for report in said:
        for vector in report.vectors:
            vectors[vector.step] = vector
    decided = max([published, *vectors, *[report.committed for report in said]])
    behind = [worker for worker, report in reports.items() if report.committed < decided]
    for worker in behind:
        report = reports[worker]
        if report.committed != decided - 1 or report.prepared != decided:
            raise BrokenInvariantError(
                f"step {decided} is committed, but {worker} stands at {report.committed} and is "
                f"prepared for {report.prepared}"
            )
    if behind and decided not in vectors:
        raise BrokenInvariantError(f"step {decided} is committed, but nobody kept its vector")
    return Verdict(step=decided, vector=vectors.get(decided))


def aligned_alike(aligned: Mapping[str, Aligned], *, at_start: bool = True) -> str:
    """Compare what aligned ranks must have in common.

    Args:
        aligned: Answers by worker.
        at_start: Whether to compare the digests too. Before the first step a difference cannot be
            repaired; later it can.

    Returns:
        What differs and on which workers; empty if all agree.
    """
    bodies = {id(body): body for body in aligned.values()}.values()  # each object once
    state = ("dense_digest", "history_digest") if at_start else ()
    for what in ("step", *state, "num_layers", "num_experts"):
        if len({getattr(body, what) for body in bodies}) > 1:
            groups: dict[object, list[str]] = {}
            for worker, body in aligned.items():
                groups.setdefault(getattr(body, what), []).append(worker)
            odd = min(groups.values(), key=len)
            return f"{what} differs on {', '.join(odd)}"
    return ""


def holders(aligned: Mapping[str, Aligned], feeders: Sequence[Seat]) -> dict[Expert, list[int]]:
    """Feeder indices that hold a live copy, ascending, for each expert."""
    bodies = [aligned.get(seat.worker) for seat in feeders]
    said = np.fromiter(map(id, bodies), dtype=np.int64, count=len(bodies))
    order = np.argsort(said, kind="stable")  # feeders grouped by answer object, ascending
    ends = np.flatnonzero(np.diff(said[order], append=-1)) + 1
    by_answer = order.tolist()
    owners: dict[Expert, list[int]] = {}
    for start, end in pairwise([0, *ends.tolist()]):
        body = bodies[by_answer[start]]
        for held in body.held if body else ():
            for expert in held.experts:
                owners.setdefault((held.layer, expert), []).extend(by_answer[start:end])
    return {expert: sorted(owners[expert]) for expert in sorted(owners)}


def needs(plan: Plan, *, num_seats: int) -> dict[Expert, list[int]]:
    """Seat indices that the plan gives a replica to, ascending, for each expert."""
    wanted: dict[Expert, list[int]] = {}
    for layer, slots_RS in enumerate(plan.expert_of_slot[:, :num_seats]):
        rank, slot = np.nonzero(slots_RS >= 0)
        expert = slots_RS[rank, slot]
        order = np.argsort(expert, kind="stable")  # ranks stay ascending within an expert
        names, first = np.unique(expert[order], return_index=True)
        parts = np.split(rank[order], first[1:])
        for name, ranks in zip(names.tolist(), parts, strict=True):
            wanted[layer, name] = ranks.tolist()
    return wanted


def schedule_moves(
    wanted: Mapping[Expert, Sequence[int]], owners: Mapping[Expert, Sequence[int]]
) -> tuple[tuple[Move, ...], tuple[Expert, ...]]:
    """Schedule the transfers of missing replicas.

    The rarest expert comes first, and the owner that has sent least so far sends.

    Args:
        wanted: Ranks that need each expert.
        owners: Ranks that hold each expert now.

    Returns:
        The moves in order, and the experts that no rank holds.
    """
    lost = tuple(sorted(expert for expert in wanted if not owners.get(expert)))
    sent: dict[int, int] = {}
    moves: list[Move] = []
    missing: dict[Expert, list[int]] = {}
    for expert, ranks in wanted.items():
        if owners.get(expert):
            if ranks == owners[expert]:
                continue
            holding = set(owners[expert])
            missing[expert] = [rank for rank in ranks if rank not in holding]
    for expert in sorted(missing, key=lambda e: (len(owners[e]), e)):
        for target in missing[expert]:
            source = min(owners[expert], key=lambda rank: (sent.get(rank, 0), rank))
            sent[source] = sent.get(source, 0) + 1
            layer, name = expert
            moves.append(Move(layer=layer, expert=name, source=source, target=target))
    return tuple(moves), lost


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotMemory:
    """Memory for experts, in bytes.

    Attributes:
        per_slot: Size of one slot, summed over all layers.
        per_node: Memory of a node that slots may fill.
        whole_node: Smallest memory that a node has.
    """

    per_slot: float
    per_node: float
    whole_node: float


def slots_for(
    *,
    num_nodes: int,
    num_experts: int,
    configured: int | None,
    started_nodes: int,
    min_replicas: int,
    spare_losses: int,
    ranks_per_node: int = 1,
    memory: SlotMemory | None = None,
) -> int:
    """The number of slots per node, as configured or automatic.

    The automatic number has room for ``min_replicas`` of every expert after ``spare_losses`` losses
    from the started size. It grows if fewer nodes are left, so that every expert still has a slot.
    Memory limits the number: the floor then holds for fewer losses, or is lowered.

    Args:
        num_nodes: Nodes of the membership.
        num_experts: Experts in each layer.
        configured: Slots per node from the configuration; None for automatic.
        started_nodes: Number of nodes that the run is configured for.
        min_replicas: Replicas of every expert to keep.
        spare_losses: Node losses after which the floor must still hold.
        ranks_per_node: Automatic numbers are multiples of this.
        memory: Memory limits; None if not known.

    Raises:
        InfeasiblePlacementError: Memory does not hold every expert once.
    """
    if configured is not None:
        return configured
    left = max(1, started_nodes - spare_losses)
    wanted = -(-num_experts * min(min_replicas, left) // left)
    least = -(-num_experts // max(1, num_nodes))
    slots = -(-min(num_experts, max(wanted, least)) // ranks_per_node) * ranks_per_node
    if memory is None:
        return slots
    fit = int(max(0.0, memory.per_node) / memory.per_slot) // ranks_per_node * ranks_per_node
    if fit < least:
        raise InfeasiblePlacementError(
            f"{num_experts} experts do not fit: memory holds {fit} slots on each of {num_nodes} "
            f"nodes, {least} are needed ({memory.per_slot / 2**30:.2f} GiB a slot, "
            f"{memory.whole_node / 2**30:.1f} GiB a node). Add nodes, or raise "
            f"placement.memory_fraction."
        )
    return min(slots, fit)

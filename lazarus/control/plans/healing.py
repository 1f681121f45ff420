"""Background healing: training resumes while some replicas of the plan are still missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from msgspec.structs import replace as changed

from lazarus.control.messages import Move
from placement import Plan

Expert = tuple[int, int]  # (layer, expert)
Missing = frozenset[tuple[int, int, int]]  # (layer, expert, rank) without its replica yet


def missing_after(moves: Iterable[Move]) -> Missing:
    """The replicas that these moves will bring, as (layer, expert, rank)."""
    return frozenset((move.layer, move.expert, move.target) for move in moves)


def without(plan: Plan, missing: Missing) -> Plan:
    """The plan reduced to the replicas that are present.

    The shares of each affected expert are scaled up over its present replicas. If the expert's home
    rank is missing its replica, the lowest rank that holds one becomes the home.

    Args:
        plan: The plan of the newest RESUME.
        missing: Replicas that are not there yet; every expert must have another one.
    """
    if not missing:
        return plan
    slots, shares, home = plan.expert_of_slot.copy(), plan.share_of_slot.copy(), plan.home.copy()
    for layer, expert, rank in sorted(missing):
        row, part = slots[layer, rank], shares[layer, rank]
        at = int((row == expert).argmax())
        row[at:-1], part[at:-1] = row[at + 1 :].copy(), part[at + 1 :].copy()
        row[-1], part[-1] = -1, 0.0
    for layer, expert in sorted({(layer, expert) for layer, expert, _ in missing}):
        held = slots[layer] == expert
        total = float(shares[layer][held].sum())
        count = int(held.sum())
        shares[layer][held] = shares[layer][held] / total if total > 0 else 1.0 / count
        if not held[home[layer, expert]].any():
            home[layer, expert] = int(held.any(axis=1).argmax())
    return replace(plan, expert_of_slot=slots, share_of_slot=shares, home=home)


def split_moves(
    moves: Sequence[Move],
    *,
    owners: Mapping[Expert, Sequence[int]],
    wanted: Mapping[Expert, Sequence[int]],
) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    """Split moves into those before RESUME and those in the background.

    RESUME frees every slot that the plan does not name. An expert that no rank both holds and keeps
    is therefore moved once before RESUME, and later moves are sent only by ranks that keep the
    expert.

    Args:
        moves: All moves, in order.
        owners: Ranks that hold each expert now.
        wanted: Ranks that the plan gives each expert to.

    Returns:
        The moves before RESUME and the moves after it, the latter with their sources chosen anew.
    """
    before: list[Move] = []
    behind: list[Move] = []
    sent: dict[int, int] = {}
    serving: dict[Expert, list[int]] = {}
    for move in moves:
        expert = (move.layer, move.expert)
        if expert not in serving:
            serving[expert] = sorted(set(owners[expert]) & set(wanted[expert]))
        if not serving[expert]:
            before.append(move)
            serving[expert].append(move.target)
            continue
        source = min(serving[expert], key=lambda rank: (sent.get(rank, 0), rank))
        sent[source] = sent.get(source, 0) + 1
        behind.append(changed(move, source=source))
    return tuple(before), tuple(behind)


def heals_behind(moves: Sequence[Move], *, mode: str, record_bytes: int, before_bytes: int) -> bool:
    """Whether to resume first and transfer replicas between optimizer steps.

    Args:
        moves: All moves of the recovery.
        mode: "before", "behind", or "auto": behind if a rank would receive more than
            ``before_bytes``.
        record_bytes: Size of one expert's image in bytes.
        before_bytes: Limit for "auto", in bytes per rank.
    """
    if mode != "auto" or not moves:
        return mode == "behind" and bool(moves)
    received: dict[int, int] = {}
    for move in moves:
        received[move.target] = received.get(move.target, 0) + record_bytes
    return max(received.values()) > before_bytes

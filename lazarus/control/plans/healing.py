"""Healing behind training: the plan while some of its replicas are still on their way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from msgspec.structs import replace as changed

from lazarus.control.messages import Move
from placement import Plan

Expert = tuple[int, int]  # (layer, expert)
Missing = frozenset[tuple[int, int, int]]  # (layer, expert, rank) without its replica yet


def missing_after(moves: Iterable[Move]) -> Missing:
    """Replicas that wait for these moves; every one has a live replica elsewhere."""
    return frozenset((move.layer, move.expert, move.target) for move in moves)


def without(plan: Plan, missing: Missing) -> Plan:
    """The plan with only the replicas that are there, at least one of each expert.

    Each expert's shares are scaled up over the replicas that are left; a home that is missing
    moves to the lowest rank that holds the expert.

    Args:
        plan: What was agreed on.
        missing: Replicas that are not there yet.
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
    """What must move before RESUME so that the rest may move behind training.

    RESUME frees every slot that the plan does not name. So an expert that no rank both holds and
    keeps moves once before, and only ranks that keep an expert send it later.

    Args:
        owners: Ranks that hold each expert now.
        wanted: Ranks that the plan gives each expert to.
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
    """Whether to resume first and refill between optimizer steps.

    Args:
        mode: "before", "behind", or "auto": behind if a rank would receive more than
            ``before_bytes``.
    """
    if mode != "auto" or not moves:
        return mode == "behind" and bool(moves)
    received: dict[int, int] = {}
    for move in moves:
        received[move.target] = received.get(move.target, 0) + record_bytes
    return max(received.values()) > before_bytes

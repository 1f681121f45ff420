"""Choose the copy that a lost expert is restored from. PURE.

All replicas of an expert without a live copy are restored from ONE chosen copy: valid on the
lineage, newest step first, then the nearest source. The number of lost routed copies is known
before the restore starts, so that it can be journaled with the decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from lazarus.checkpoint.format.lineage import Lineage, is_valid
from lazarus.checkpoint.format.manifest import expert_name

POLICIES = ("partial", "rollback", "fail")


class Source(IntEnum):
    """Where a copy is stored, nearest first."""

    LIVE = 0
    OWN_NODE = 1
    OTHER_NODE = 2
    STORAGE = 3
    INITIAL = 4

    @property
    def label(self) -> str:
        """The source's name in the run's record and in messages."""
        return ("live", "own_snapshot", "node_snapshot", "storage", "initial")[self]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One complete copy of one expert, as listed by a keeper's inventory or a manifest.

    ``node`` is the node that holds the copy (-1: storage or initial state), ``routed`` the
    expert's cumulative count of routed copies at ``step``, ``checksum`` the digest if known.
    """

    layer: int
    expert: int
    generation: int
    step: int
    source: Source
    node: int = -1
    routed: int = 0
    checksum: str = ""
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """An expert without a live replica.

    ``targets`` are the nodes that will hold the expert, ``routed`` its cumulative count of routed
    copies at the resume step, ``copies`` all known copies.
    """

    layer: int
    expert: int
    targets: tuple[int, ...]
    routed: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredExpert:
    """The chosen copy of one lost expert, and what restoring from it costs.

    ``lost_copies`` may count routed copies that an earlier restore has already lost;
    ``PltLedger`` counts each of them once.
    """

    copy: Copy
    source: Source
    behind_steps: int
    lost_copies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """Decision: continue at the resume step and restore ``experts`` from their chosen copies.

    ``refused`` says why the user's policy did not make this decision; empty if it did.
    """

    experts: tuple[RestoredExpert, ...]
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollback:
    """Decision: take all state back to ``step`` and train on the later samples again."""

    step: int
    reason: str = ""
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fail:
    """Decision: end the run, which can be resumed. ``experts`` are the lost (layer, expert)."""

    reason: str
    experts: tuple[tuple[int, int], ...]
    refused: str = ""


RecoveryDecision = Restore | Rollback | Fail


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """A usable checkpoint on storage, reduced to what a decision needs."""

    generation: int
    step: int
    is_full: bool


def decide_recovery(
    losses: Sequence[Loss],
    *,
    policy: str,
    lineage: Lineage,
    resume_step: int,
    checkpoints: Sequence[StoredCheckpoint] = (),
    start_step: int = 0,
) -> RecoveryDecision:
    """Decide what happens to experts that have no live replica left.

    Args:
        losses: The lost experts, each with all copies that any inventory or manifest lists.
        policy: ``partial`` restores each expert from its newest copy. ``rollback`` takes all state
            back to the newest full checkpoint; without a full one to the newest partial one, and
            without any checkpoint to the start of the run. ``fail`` ends the run.
        lineage: Pairs (generation, step) of every RESUME so far.
        resume_step: The committed step that training continues from.
        checkpoints: Usable checkpoints on storage.
        start_step: Step that the run started from; every node can recreate its state.

    Raises:
        ValueError: ``policy`` is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"on_lost_expert={policy!r} is none of {', '.join(POLICIES)}")
    names = ", ".join(expert_name(x.layer, x.expert) for x in losses[:5])
    keys = tuple((x.layer, x.expert) for x in losses)
    if not losses:
        return Restore(experts=())
    if policy == "fail":
        return Fail(reason=f"no live replica of {names}, and on_lost_expert=fail", experts=keys)
    if policy == "rollback":
        usable = [c for c in checkpoints if _is_usable(c, lineage, resume_step)]
        return _rollback(names, usable, resume_step=resume_step, start_step=start_step)
    chosen = [choose_copy(x, lineage=lineage, resume_step=resume_step) for x in losses]
    if lost := [x for x, choice in zip(losses, chosen, strict=True) if choice is None]:
        first = expert_name(lost[0].layer, lost[0].expert)
        seen = len(lost[0].copies)
        none = f"none of its {seen} known copies is valid" if seen else "no copy of it can be read"
        return Fail(
            reason=f"{first} has no live replica and {none} at step {resume_step}",
            experts=tuple((x.layer, x.expert) for x in lost),
        )
    return Restore(experts=tuple(choice for choice in chosen if choice is not None))


def choose_copy(loss: Loss, *, lineage: Lineage, resume_step: int) -> RestoredExpert | None:
    """The copy that a lost expert is restored from, or None if no copy is valid.

    The newest step wins; then the nearest source, the newer generation, the lower node id.
    """
    valid = [
        (copy, _nearness(copy, loss.targets))
        for copy in loss.copies
        if (copy.layer, copy.expert) == (loss.layer, loss.expert)
        and is_valid(
            generation=copy.generation, step=copy.step, lineage=lineage, resume_step=resume_step
        )
    ]
    if not valid:
        return None
    best, source = min(valid, key=lambda c: (-c[0].step, c[1], -c[0].generation, c[0].node))
    return RestoredExpert(
        copy=best,
        source=source,
        behind_steps=resume_step - best.step,
        lost_copies=max(0, loss.routed - best.routed),
    )


def _nearness(copy: Copy, targets: Sequence[int]) -> Source:
    if copy.source in (Source.OWN_NODE, Source.OTHER_NODE):
        return Source.OWN_NODE if copy.node in targets else Source.OTHER_NODE
    return copy.source


def _is_usable(checkpoint: StoredCheckpoint, lineage: Lineage, resume_step: int) -> bool:
    return is_valid(
        generation=checkpoint.generation,
        step=checkpoint.step,
        lineage=lineage,
        resume_step=resume_step,
    )


def _rollback(
    names: str, usable: Sequence[StoredCheckpoint], *, resume_step: int, start_step: int
) -> Rollback:
    best = max(usable, key=lambda c: (c.is_full, c.step), default=None)
    step = start_step if best is None else best.step
    return Rollback(
        step=step,
        reason=f"no live replica of {names}: back to step {step}, {resume_step - step} steps again",
    )

"""Somebody else's answer to lost experts: what it may say, and whether that can be done. PURE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lazarus.checkpoint.format.lineage import Lineage, is_valid
from lazarus.checkpoint.format.manifest import expert_name
from lazarus.checkpoint.restoring.restore_choice import (
    Copy,
    Fail,
    Loss,
    RecoveryDecision,
    Restore,
    RestoredExpert,
    Rollback,
    StoredCheckpoint,
    choose_copy,
    decide_recovery,
)
from lazarus.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """Ask again in ``for_s`` seconds; training waits meanwhile."""

    for_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End the run; it can be resumed."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """What a recovery policy knows beside the losses.

    Attributes:
        step: Committed step that training stands at.
        nodes: Members of the next generation, by join order.
        lineage: Pairs (generation, step) of every RESUME so far.
        checkpoints: Usable ones on storage.
        start_step: Where the run started; a rollback may always go there.
        in_flight: Newest step whose checkpoint the survivors still write; -1 for none.
        plt: Portion of lost tokens so far.
        plt_budget: What the run was given of it.
        waited_s: How long this recovery has been held already.
    """

    step: int
    nodes: tuple[int, ...]
    lineage: Lineage
    checkpoints: tuple[StoredCheckpoint, ...]
    start_step: int
    in_flight: int
    plt: float
    plt_budget: float
    waited_s: float


Answer = Mapping[tuple[int, int], Copy] | Rollback | Hold | Stop


class RecoveryPolicy(Protocol):
    """Decides what becomes of experts without a live replica. Pure: no clock but ``now_s``."""

    def __call__(self, losses: Sequence[Loss], view: ClusterView, *, now_s: float) -> Answer:
        """One of ``Loss.copies`` for each (layer, expert), or what happens instead."""
        ...


class RecoveryDecider(Protocol):
    """A recovery policy whose answers are decisions that can be carried out."""

    def __call__(
        self, losses: Sequence[Loss], view: ClusterView, *, now_s: float
    ) -> RecoveryDecision | Hold: ...


def decided_by_setting(
    losses: Sequence[Loss], view: ClusterView, on_lost_expert: str
) -> RecoveryDecision:
    """The library's own decision, see ``decide_recovery``."""
    return decide_recovery(
        losses,
        policy=on_lost_expert,
        lineage=view.lineage,
        resume_step=view.step,
        checkpoints=view.checkpoints,
        start_step=view.start_step,
    )


def on_history(losses: Sequence[Loss], view: ClusterView) -> tuple[tuple[Loss, ...], ClusterView]:
    """The same without copies and checkpoints that lie on no history of the run's present step."""

    def there(one: Copy | StoredCheckpoint) -> bool:
        return is_valid(
            generation=one.generation, step=one.step, lineage=view.lineage, resume_step=view.step
        )

    known = tuple(replace(x, copies=tuple(filter(there, x.copies))) for x in losses)
    return known, replace(view, checkpoints=tuple(filter(there, view.checkpoints)))


def decision_of(
    answer: object, losses: Sequence[Loss], view: ClusterView
) -> RecoveryDecision | Hold:
    """The decision that an answer means.

    Args:
        answer: What the policy returned.
        losses: What it was asked, ``on_history``.
        view: Likewise.

    Raises:
        ConfigError: It means none, or one that cannot be carried out; the message says why.
    """
    match answer:
        case Stop(reason=reason):
            return Fail(reason=reason, experts=tuple((x.layer, x.expert) for x in losses))
        case Hold(for_s=for_s):
            if not (math.isfinite(for_s) and for_s > 0):
                raise ConfigError(f"it holds for {for_s} s; give a positive number of seconds")
            return answer
        case Rollback(step=step):
            steps = sorted({view.start_step, *(c.step for c in view.checkpoints)})
            if step not in steps:
                raise ConfigError(f"it rolls back to step {step}; there are {steps}")
            return answer
        case Mapping():
            return Restore(experts=tuple(_restored(answer, loss, view) for loss in losses))
    raise ConfigError(
        f"it returned {type(answer).__name__}; wanted a copy for each lost expert, Rollback, Hold "
        f"or Stop"
    )


def _restored(
    answer: Mapping[tuple[int, int], Copy], loss: Loss, view: ClusterView
) -> RestoredExpert:
    name = expert_name(loss.layer, loss.expert)
    copy = answer.get((loss.layer, loss.expert))
    if copy is None:
        raise ConfigError(f"it names no copy of {name}")
    if copy not in loss.copies:
        raise ConfigError(f"its copy of {name}, of step {copy.step}, is none of the known ones")
    found = choose_copy(replace(loss, copies=(copy,)), lineage=view.lineage, resume_step=view.step)
    if found is None:
        raise ConfigError(f"its copy of {name}, of step {copy.step}, is not on the run's history")
    return found

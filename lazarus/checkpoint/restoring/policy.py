"""The interface of recovery policies, and the check that an answer can be carried out. PURE.

A recovery policy is user code that decides what happens to experts without a live replica.
"""

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
    """Answer: ask the policy again in ``for_s`` seconds; training waits meanwhile."""

    for_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Answer: end the run for ``reason``. The run can be resumed later."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """The state of the cluster that a recovery policy sees in addition to the losses.

    Attributes:
        step: The last committed step.
        nodes: Node ids of the next generation, by join order.
        lineage: Pairs (generation, step) of every RESUME so far.
        checkpoints: Usable checkpoints on storage.
        start_step: Step that the run started from; a rollback to it is always possible.
        in_flight: Newest step whose checkpoint the survivors are still writing; -1 for none.
        plt: Portion of lost tokens so far, in [0, 1].
        plt_budget: Portion of lost tokens that the run may reach.
        waited_s: Seconds that ``Hold`` answers have delayed this recovery so far.
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
    """Decides what happens to experts without a live replica.

    A policy must be pure: its only clock is ``now_s``.
    """

    def __call__(self, losses: Sequence[Loss], view: ClusterView, *, now_s: float) -> Answer:
        """Answer one recovery.

        Args:
            losses: The lost experts, each with its known copies.
            view: The state of the cluster.
            now_s: The present time in seconds.

        Returns:
            A mapping from each lost (layer, expert) to one of its ``Loss.copies``; or a
            ``Rollback``, ``Hold`` or ``Stop``.
        """
        ...


class RecoveryDecider(Protocol):
    """A recovery policy whose answers are already checked decisions."""

    def __call__(
        self, losses: Sequence[Loss], view: ClusterView, *, now_s: float
    ) -> RecoveryDecision | Hold: ...


def decided_by_setting(
    losses: Sequence[Loss], view: ClusterView, on_lost_expert: str
) -> RecoveryDecision:
    """The built-in decision for a value of ``on_lost_expert``, see ``decide_recovery``."""
    return decide_recovery(
        losses,
        policy=on_lost_expert,
        lineage=view.lineage,
        resume_step=view.step,
        checkpoints=view.checkpoints,
        start_step=view.start_step,
    )


def on_history(losses: Sequence[Loss], view: ClusterView) -> tuple[tuple[Loss, ...], ClusterView]:
    """Losses and view without copies and checkpoints that are not on the run's history."""

    def there(one: Copy | StoredCheckpoint) -> bool:
        return is_valid(
            generation=one.generation, step=one.step, lineage=view.lineage, resume_step=view.step
        )

    known = tuple(replace(x, copies=tuple(filter(there, x.copies))) for x in losses)
    return known, replace(view, checkpoints=tuple(filter(there, view.checkpoints)))


def decision_of(
    answer: object, losses: Sequence[Loss], view: ClusterView
) -> RecoveryDecision | Hold:
    """Turn a policy's answer into a decision.

    Args:
        answer: The value that the policy returned.
        losses: The losses given to the policy, filtered by ``on_history``.
        view: The view given to the policy, filtered by ``on_history``.

    Raises:
        ConfigError: The answer is no decision, or cannot be carried out; the message says why.
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

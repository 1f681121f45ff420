"""A recovery policy of somebody else can be tried on many losses before a run depends on it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from lazarus.checkpoint.restoring.policy import decided_by_setting
from lazarus.checkpoint.restoring.restore_choice import Restore
from lazarus.recovery import Answer, ClusterView, ExpertLoss, Rollback, Stop
from lazarus.testing import conformance


def newest_anywhere(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    """The policy of ``lazarus.recovery``'s docstring, and what it leaves out."""
    if not all(x.copies for x in losses):
        return Rollback(step=max((c.step for c in view.checkpoints), default=view.start_step))
    return {(x.layer, x.expert): max(x.copies, key=lambda copy: copy.step) for x in losses}


def as_the_library(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    decision = decided_by_setting(losses, view, "partial")
    if isinstance(decision, Restore):
        return {(x.copy.layer, x.copy.expert): x.copy for x in decision.experts}
    return Stop(reason=str(decision))


@pytest.mark.parametrize("policy", [newest_anywhere, as_the_library])
def test_policies_that_keep_to_the_rules_pass(policy: object) -> None:
    for seed in range(5):
        assert conformance(recovery=policy, seed=seed) == 200  # type: ignore[arg-type]


def forgets_one(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    return {(x.layer, x.expert): x.copies[0] for x in losses[:1]}


def rolls_back_anywhere(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    return Rollback(step=view.step)


_turn = itertools.count()


def wavers(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    return Stop(reason=str(next(_turn)))


def crosses_out(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    object.__setattr__(losses[0], "copies", ())
    return Stop(reason="none")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (forgets_one, "names no copy of|IndexError"),
        (rolls_back_anywhere, "it rolls back to step"),
        (wavers, "two answers"),
        (crosses_out, "the question was changed"),
        (lambda losses, view, *, now_s: None, "it returned NoneType"),
        (lambda losses, view, *, now_s: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_policies_that_do_not_are_caught_with_the_question(policy: object, said: str) -> None:
    with pytest.raises(AssertionError, match=said) as problem:
        conformance(recovery=policy)  # type: ignore[arg-type]
    assert "question" in str(problem.value) and "of seed 0" in str(problem.value)

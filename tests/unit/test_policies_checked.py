"""Policies of somebody else: used where their answers hold, and never in anybody's way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lazarus.checkpoint.restoring.restore_choice import Fail, Restore
from lazarus.policy.checked import CheckedPlacement, CheckedRecovery
from lazarus.recovery import (
    Answer,
    ClusterView,
    Copy,
    ExpertLoss,
    Hold,
    Rollback,
    Source,
    Stop,
    StoredCheckpoint,
)
from placement import InfeasiblePlacementError, PlacementRequest, Plan, plan, replan

REQUEST = PlacementRequest(load=np.ones(6), num_nodes=3, slots_per_node=4, min_replicas=2)


def asked(policy: Callable[..., object], request: PlacementRequest = REQUEST) -> Plan:
    checked = CheckedPlacement(policy, limit_s=30.0)  # type: ignore[arg-type]
    return checked(request, previous=None, lost=frozenset())


def once_each(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
    """A valid plan, but with a lower floor than is feasible."""
    return plan(replace(request, min_replicas=1, slots_per_node=request.num_experts // 3))


def fails(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
    raise ZeroDivisionError("nobody thought of this")


def test_a_plan_that_answers_the_request_is_used_as_it_is() -> None:
    found = asked(replan)
    assert found.digest == replan(REQUEST, previous=None).digest
    assert found.fallback == ""


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (fails, "ZeroDivisionError: nobody thought of this"),
        (lambda *_, **__: "here and there", "it returned str"),
        (lambda: None, "TypeError"),
        (once_each, "slots of shape"),
    ],
)
def test_an_answer_that_does_not_hold_is_replaced_and_the_plan_says_why(
    policy: Callable[..., object], reason: str
) -> None:
    found = asked(policy)
    assert reason in found.fallback
    assert found.digest == replan(replace(REQUEST, solver="greedy"), previous=None).digest
    assert Plan.from_json(found.to_json()).fallback == found.fallback


def test_an_impossible_request_is_refused_whatever_the_policy_says() -> None:
    impossible = PlacementRequest(load=np.ones(7), num_nodes=2, slots_per_node=3, min_replicas=1)
    with pytest.raises(InfeasiblePlacementError):
        asked(fails, impossible)


def test_a_slow_policy_costs_its_limit_once_and_is_asked_again_when_it_has_ended() -> None:
    go, calls = threading.Event(), []

    def slow(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
        calls.append(threading.current_thread())
        go.wait(60)
        return replan(request, previous=previous, lost=lost)

    checked = CheckedPlacement(slow, limit_s=0.05)
    first = checked(REQUEST, previous=None, lost=frozenset())
    second = checked(REQUEST, previous=first, lost=frozenset())
    assert "no answer within 50 ms (placement.max_plan_ms)" in first.fallback
    assert "still at an earlier answer" in second.fallback
    assert len(calls) == 1
    go.set()
    calls[0].join()
    patient = CheckedPlacement(slow, limit_s=30.0)
    assert patient(REQUEST, previous=None, lost=frozenset()).fallback == ""


def test_checked_policies_travel_to_the_controller() -> None:
    checked = copy.deepcopy(CheckedPlacement(fails, limit_s=1.0))  # by the same door as pickle
    assert "ZeroDivisionError" in checked(REQUEST, previous=None, lost=frozenset()).fallback


# ---- experts without a live replica --------------------------------------------------------------

NEW = Copy(layer=0, expert=1, generation=1, step=8, source=Source.OTHER_NODE, node=2, routed=80)
OLD = Copy(layer=0, expert=1, generation=1, step=5, source=Source.STORAGE, routed=50)
VOID = Copy(layer=0, expert=1, generation=1, step=11, source=Source.STORAGE, routed=110)
LOSS = ExpertLoss(layer=0, expert=1, targets=(0,), routed=90, copies=(NEW, OLD, VOID))
STORED = StoredCheckpoint(generation=1, step=5, is_full=False)
VIEW = ClusterView(
    step=9, nodes=(0, 2), lineage=((1, 0),),
    checkpoints=(STORED, StoredCheckpoint(generation=1, step=11, is_full=True)),
    start_step=0, in_flight=-1, plt=0.0, plt_budget=0.05, waited_s=0.0,
)  # fmt: skip


def decided(answer: object) -> object:
    def policy(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        # What the run has left behind, by a rollback say, is not offered.
        assert losses == (replace(LOSS, copies=(NEW, OLD)),)
        assert (view, now_s) == (replace(VIEW, checkpoints=(STORED,)), 3.0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    checked = CheckedRecovery(policy, limit_s=30.0, on_lost_expert="partial")
    return checked([LOSS], VIEW, now_s=3.0)


def test_the_copy_that_a_policy_names_is_the_one_that_comes_back_with_its_bill() -> None:
    decision = decided({(0, 1): OLD})
    assert isinstance(decision, Restore)
    (chosen,) = decision.experts
    assert (chosen.copy, chosen.behind_steps, chosen.lost_copies) == (OLD, 4, 40)
    assert decision.refused == ""


def test_a_policy_may_roll_back_hold_or_stop() -> None:
    assert decided(Rollback(step=5)) == Rollback(step=5)
    assert decided(Rollback(step=0)) == Rollback(step=0)
    assert decided(Hold(for_s=2.0)) == Hold(for_s=2.0)
    assert decided(Stop(reason="too dear")) == Fail(reason="too dear", experts=((0, 1),))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({}, "it names no copy of L0/E1"),
        ({(0, 1): replace(OLD, step=6)}, "is none of the known ones"),
        ({(0, 1): VOID}, "of step 11, is none of the known ones"),
        (Rollback(step=11), "it rolls back to step 11; there are [0, 5]"),
        (Rollback(step=7), "it rolls back to step 7; there are [0, 5]"),
        (Hold(for_s=0.0), "it holds for 0.0 s"),
        (Hold(for_s=float("nan")), "it holds for nan s"),
        (None, "it returned NoneType"),
        (KeyError("x"), "KeyError"),
    ],
)
def test_what_cannot_be_done_is_left_to_the_setting(answer: object, reason: str) -> None:
    decision = decided(answer)
    assert isinstance(decision, Restore)
    assert reason in decision.refused
    assert decision.experts[0].copy == NEW

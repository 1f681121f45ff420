"""What the controller asks a placement policy and a recovery policy, and what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from control_desk import EXPERTS, Desk, running
from msgspec.structs import replace as changed

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Phase
from lazarus.control.messages import Hello, NodeNotice
from lazarus.control.plans.verdict import SlotMemory, slots_for
from lazarus.control.ports import DriverSaid
from lazarus.policy.checked import CheckedPlacement, CheckedRecovery
from lazarus.recovery import Answer, ClusterView, ExpertLoss, Hold, RecoveryPolicy, Stop
from placement import InfeasiblePlacementError, PlacementRequest, Plan, replan

ZONES = {"w0": "a", "w1": "", "w2": "a"}
GIB = 1 << 30


class ZonedDesk(Desk):
    def hello(self, worker: str) -> Hello:
        return changed(super().hello(worker), zone=ZONES[worker], memory_bytes=GIB)


class Spy:
    """The library's policy, and what it was asked."""

    def __init__(self) -> None:
        self.requests: list[PlacementRequest] = []

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        self.requests.append(request)
        return replan(request, previous=previous, lost=lost)


@pytest.mark.parametrize("by_zone", [True, False])
def test_nodes_of_a_zone_fail_together_in_the_plan_if_the_run_says_so(by_zone: bool) -> None:
    spy = Spy()
    ZonedDesk(placement=spy, plans_by_zone=by_zone, plan_limit_s=0.25)
    (request,) = spy.requests
    assert request.domains == (("a", "node 1", "a") if by_zone else ())
    assert request.solver_limit_s == 0.25


def test_zones_that_nobody_names_change_nothing() -> None:
    spy = Spy()
    Desk(placement=spy, plans_by_zone=True)
    assert spy.requests[0].domains == ()


def test_automatic_slots_stay_within_the_memory_of_the_smallest_node() -> None:
    spy = Spy()
    desk = ZonedDesk(placement=spy, min_replicas=3)
    slot = 4 / 3  # bytes: the desk's experts are records of one byte, and a third is gradient
    assert spy.requests[0].slots_per_node == 3
    tight = ZonedDesk(placement=spy, min_replicas=3, memory_fraction=2.5 * slot / GIB)
    assert spy.requests[-1].slots_per_node == 2
    assert tight.state.standing.plan is not None and tight.state.standing.plan.floor == 2
    assert desk.state.standing.plan is not None and desk.state.standing.plan.floor == 3


def test_experts_that_fit_in_no_memory_are_refused_with_the_numbers() -> None:
    def slots(per_slot: int) -> int:
        return slots_for(
            num_nodes=2, num_experts=8, configured=None, started_nodes=2, min_replicas=1,
            spare_losses=0, memory=SlotMemory(per_slot=per_slot, per_node=GIB, whole_node=2 * GIB),
        )  # fmt: skip

    assert slots(GIB // 4) == 4
    with pytest.raises(InfeasiblePlacementError, match=r"holds 3 slots on each of 2 nodes, 4 are"):
        slots(GIB // 3)


def test_a_policy_that_fails_is_on_record_and_the_run_goes_on() -> None:
    def fails(*_: object, **__: object) -> Plan:
        raise RuntimeError("no idea")

    desk = running(placement=CheckedPlacement(fails, limit_s=None))
    (event,) = desk.events("plan_fallback")
    assert event == {"generation": 1, "reason": "placement.policy: RuntimeError: no idea"}


# ---- recovery ------------------------------------------------------------------------------------


def losing(policy: RecoveryPolicy, **config: Any) -> Desk:
    """A run of eight steps that has a checkpoint of step 8, and loses a node with its expert."""
    checked = CheckedRecovery(policy, limit_s=None, on_lost_expert="partial")
    desk = running(recovery=checked, **config)
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.written(8)
    desk.commit(9)
    desk.lose("w2")
    return desk


def test_a_recovery_policy_chooses_the_copy() -> None:
    seen: list[ClusterView] = []

    def initial(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        seen.append(view)
        return {(x.layer, x.expert): min(x.copies, key=lambda copy: copy.step) for x in losses}

    desk = losing(initial)
    (event,) = desk.events("expert_restored")
    assert (event["source"], event["behind_steps"]) == ("initial", 9)
    assert not desk.events("plan_fallback")
    assert (seen[0].step, seen[0].nodes) == (9, (0, 1))
    assert [c.step for c in seen[0].checkpoints] == [8]


def test_a_policy_that_holds_is_asked_again_and_may_stop_the_run() -> None:
    asked: list[float] = []

    def holds(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        asked.append(view.waited_s)
        return Hold(for_s=1.0) if view.waited_s < 2.5 else Stop(reason="waited in vain")

    desk = losing(holds)
    assert desk.state.phase is Phase.ALIGNING
    for _ in range(20):
        desk.tick()
    assert asked == pytest.approx([0.0, 1.0, 2.0, 3.0])
    (finished,) = desk.events("run_finished")
    assert finished["status"] == "short"


def test_a_policy_that_holds_for_ever_is_passed_over() -> None:
    def holds(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        return Hold(for_s=4.0)

    desk = losing(holds, timeouts=replace(derive_timeouts(60.0), startup_s=10.0))
    for _ in range(70):
        desk.tick()
    assert desk.state.phase is Phase.RUNNING
    (event,) = desk.events("expert_restored")
    assert event["source"] == "storage"
    assert event["expert"] in range(EXPERTS)


def test_a_notice_for_a_node_that_has_not_said_hello_waits_for_it() -> None:
    desk = running()
    desk.feed(DriverSaid(body=NodeNotice(node_key="n9", notice_s=30.0), at_s=desk.now_s))
    assert not desk.events("drain_notice")
    desk.committed["w9"] = desk.entered["w9"] = 0
    desk.say("w9", desk.hello("w9"))
    (event,) = desk.events("drain_notice")
    assert (event["node"], event["notice_s"]) == (3, 30.0)
    for _ in range(30):
        desk.tick()
    assert 3 not in desk.state.standing.members

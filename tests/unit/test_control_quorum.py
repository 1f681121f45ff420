"""A run that cannot go on keeps its state, says so once, and goes on when it can."""

from __future__ import annotations

from typing import Any

from control_desk import Desk, running

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Phase
from lazarus.control.messages import Align, Pause, RunOver, StartNode, StopRun
from lazarus.control.ports import DriverSaid, TellDriver
from lazarus.failure import Cause
from placement import InfeasiblePlacementError, Plan, replan

REPLICATED = {"slots_per_node": 2, "min_replicas": 2}  # one loss leaves every expert alive


def only_for_three(*args: Any, **more: Any) -> Plan:
    """A policy that finds no plan for two nodes."""
    plan = replan(*args, **more)
    if plan.num_nodes == 2:
        raise InfeasiblePlacementError("two nodes are no cluster")
    return plan


def over(desk: Desk) -> RunOver:
    (found,) = [c.body for c in desk.of(TellDriver) if isinstance(c.body, RunOver)]
    return found


def started(desk: Desk) -> int:
    return sum(isinstance(c.body, StartNode) for c in desk.of(TellDriver))


def keep_alive(desk: Desk, seconds: float) -> None:
    """Time passes while everybody's process answers."""
    until_s = desk.now_s + seconds
    while desk.now_s < until_s and desk.state.phase is not Phase.ENDED:
        for worker in desk.state.roster.workers:
            desk.say(worker, desk.beat())
        desk.tick(1.0)


def test_too_few_nodes_hold_the_run_until_another_one_comes() -> None:
    desk = running(min_nodes=3, **REPLICATED)
    desk.lose("w2")
    assert desk.state.phase is Phase.HOLDING
    (event,) = desk.events("quorum_lost")
    assert (event["nodes"], event["needed"], event["broken"]) == ([0, 1], 3, False)
    assert started(desk) == 1
    keep_alive(desk, 30.0)
    assert desk.state.phase is Phase.HOLDING and len(desk.events("quorum_lost")) == 1
    desk.join("w3")
    assert desk.state.phase is Phase.RUNNING
    assert (desk.state.standing.members, desk.state.step) == ((0, 1, 3), 8)
    assert desk.events("quorum_regained") == [{"generation": 3, "nodes": [0, 1, 3]}]
    assert not desk.events("run_restarted")


def test_where_no_plan_fits_the_same_nodes_are_not_asked_again() -> None:
    desk = running(placement=only_for_three, **REPLICATED)
    desk.lose("w2")
    assert desk.state.phase is Phase.HOLDING and desk.state.generation == 2
    assert desk.events("quorum_lost")[0]["reason"] == "two nodes are no cluster"
    keep_alive(desk, 5.0)
    assert desk.state.generation == 2
    desk.join("w3")
    assert (desk.state.phase, desk.state.standing.members) == (Phase.RUNNING, (0, 1, 3))


def test_a_plan_that_fits_no_nodes_at_the_start_is_the_users_to_change() -> None:
    desk = Desk(nodes=2, placement=only_for_three)
    end = over(desk)
    assert end.status == "failed" and end.failure is not None
    assert (end.failure.cause, end.failure.error) == (Cause.USER_CODE, "ConfigError")


def test_a_hold_that_lasts_too_long_ends_the_run_short() -> None:
    desk = running(min_nodes=3, quorum_timeout_s=20.0, **REPLICATED)
    desk.lose("w2")
    keep_alive(desk, 19.0)
    assert desk.state.phase is Phase.HOLDING
    keep_alive(desk, 2.0)
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert (end.failure.error, end.failure.details["live"]) == ("QuorumTimeoutError", 2)


def test_a_stop_while_the_run_holds_names_the_experts_that_are_gone() -> None:
    desk = running(min_nodes=3)  # one slot a node
    desk.lose("w2")
    desk.feed(DriverSaid(body=StopRun(reason="enough"), at_s=desk.now_s))
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert "1 experts of it have no live replica; no checkpoint stands" in end.failure.message


def test_that_message_names_the_newest_checkpoint() -> None:
    desk = running(min_nodes=3)
    for step in (4, 6):
        for worker in desk.state.standing.seats:
            desk.share(worker, step)
        desk.written(step)
    desk.lose("w2")
    desk.feed(DriverSaid(body=StopRun(reason="enough"), at_s=desk.now_s))
    failure = over(desk).failure
    assert failure is not None and "the newest is of step 6" in failure.message


def test_joiners_come_up_to_the_most_nodes() -> None:
    desk = running(max_nodes=4, join_debounce_s=0.0, **REPLICATED)
    desk.join("w3", "w4")
    desk.tick()
    desk.pause()
    assert desk.state.standing.members == (0, 1, 2, 3)
    before = len(desk.told(Pause))
    keep_alive(desk, 5.0)
    assert len(desk.told(Pause)) == before  # for whom there is no room nobody stops


def test_joiners_that_come_shortly_after_each_other_cost_one_pause() -> None:
    desk = running(join_debounce_s=2.0, **REPLICATED)
    desk.join("w3")
    keep_alive(desk, 1.0)
    desk.join("w4")
    keep_alive(desk, 1.0)
    assert not desk.told(Pause)
    keep_alive(desk, 1.0)
    desk.pause()
    assert desk.state.standing.members == (0, 1, 2, 3, 4)


def nobody_left(**config: Any) -> Desk:
    """All three nodes die after step 9; the newest checkpoint is of step 8."""
    desk = running(**(REPLICATED | config))
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.written(8)
    desk.commit(9)
    keep_alive(desk, 40.0)
    desk.lose("w0", "w1", "w2")
    assert desk.state.phase is Phase.HOLDING
    return desk


def test_fresh_nodes_go_on_from_the_newest_checkpoint() -> None:
    desk = nobody_left()
    assert desk.events("quorum_lost")[-1]["reason"] == "every node is lost at step 9"
    desk.join("w3", "w4")
    keep_alive(desk, 5.0)
    assert desk.state.phase is Phase.HOLDING  # a third one is on its way
    desk.join("w5")
    assert (desk.state.phase, desk.state.standing.members) == (Phase.RUNNING, (3, 4, 5))
    assert desk.state.step == 8
    assert {body.reload for body in desk.told(Align)[-3:]} == {"/ckpt 8"}
    (event,) = desk.events("run_restarted")
    assert (event["step"], event["from_step"]) == (8, 9)


def test_fresh_nodes_do_not_wait_long_for_others() -> None:
    desk = nobody_left(timeouts=derive_timeouts(10.0))
    desk.join("w3", "w4")
    keep_alive(desk, 9.0)
    assert desk.state.phase is Phase.HOLDING
    keep_alive(desk, 2.0)
    assert (desk.state.phase, desk.state.standing.members) == (Phase.RUNNING, (3, 4))


def test_fresh_nodes_wait_for_a_checkpoint_that_is_just_being_written() -> None:
    desk = running(**REPLICATED)
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    assert desk.state.saving.writing
    desk.lose("w0", "w1", "w2")
    desk.join("w3", "w4", "w5")
    assert desk.state.phase is Phase.HOLDING
    desk.written(8)
    assert desk.state.phase is Phase.RUNNING and desk.state.step == 8


def test_a_checkpoint_that_never_ends_keeps_fresh_nodes_no_longer_than_a_stall() -> None:
    desk = running(**REPLICATED, timeouts=derive_timeouts(10.0))
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.lose("w0", "w1", "w2")
    desk.join("w3", "w4", "w5")
    keep_alive(desk, 9.0)
    assert desk.state.phase is Phase.HOLDING
    keep_alive(desk, 2.0)
    assert desk.state.phase is Phase.RUNNING and desk.state.step == 0


def test_too_few_fresh_nodes_do_not_restart_the_run_and_the_wait_ends() -> None:
    desk = nobody_left(min_nodes=2, quorum_timeout_s=20.0)
    desk.join("w3")
    keep_alive(desk, 19.0)
    assert desk.state.phase is Phase.HOLDING
    keep_alive(desk, 2.0)
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert (end.failure.error, end.failure.details["live"]) == ("QuorumTimeoutError", 1)


def test_a_stop_after_all_are_gone_ends_the_run_at_once() -> None:
    desk = nobody_left()
    desk.feed(DriverSaid(body=StopRun(reason="enough"), at_s=desk.now_s))
    assert over(desk).status == "short"


def test_the_loss_of_everybody_while_the_run_stops_names_the_way_on() -> None:
    desk = running(**REPLICATED)
    desk.feed(DriverSaid(body=StopRun(reason="enough"), at_s=desk.now_s))
    desk.tick(11.0)  # nobody has said anything for longer than the tolerated stall
    failure = over(desk).failure
    assert failure is not None and failure.cause is Cause.NODE
    assert "resume from the newest checkpoint" in failure.message

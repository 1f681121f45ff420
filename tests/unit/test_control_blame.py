"""Who is blamed for what a worker says of itself, and for how it died: event scripts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from control_desk import Desk, running

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Phase
from lazarus.control.messages import (
    Depart,
    Heartbeat,
    Injected,
    Report,
    StopRun,
    UserError,
    WorkerDied,
)
from lazarus.control.ports import DriverGone, DriverSaid, TellDriver
from lazarus.failure import Cause, Failure


def raises(desk: Desk, worker: str, *, step: int = 9, **more: Any) -> None:
    body = UserError(generation=1, step=step, error="ValueError: x", **more)
    desk.say(worker, body)


def dies(desk: Desk, number: int, cause: str = "SIGSEGV", **more: Any) -> None:
    """The stream closes, then the launcher tells how the process ended."""
    note = {"generation": desk.state.resumed, "step": desk.state.step + 1, "phase": "forward"}
    desk.lose(f"w{number}")
    body = WorkerDied(worker=f"n{number}.0", cause=cause, **(note | more))
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    desk.tick()


def end_of(desk: Desk) -> tuple[str, str]:
    (end,) = desk.events("run_finished")
    return end["status"], end["cause"]


def failure_of(desk: Desk) -> Failure:
    (over,) = [c.body for c in desk.of(TellDriver) if type(c.body).__name__ == "RunOver"]
    return over.failure


def test_the_first_exception_of_user_code_ends_the_run_and_nobody_is_lost() -> None:
    """C3: one node of three raises."""
    desk = running()
    raises(desk, "w1", rank=1, phase="forward", sample_ids=(4, 7), place="t.py:3 in loss")
    assert end_of(desk) == ("failed", "user_code")
    assert not desk.events("node_lost")
    (event,) = desk.events("user_error")
    assert (event["rank"], event["step"], event["sample_ids"]) == (1, 9, [4, 7])
    failure = failure_of(desk)
    assert (failure.cause, failure.phase, failure.place) == (
        Cause.USER_CODE, "forward", "t.py:3 in loss",
    )  # fmt: skip
    assert len(desk.told(Depart)) == 3


def test_what_a_dying_step_committed_is_on_record_before_the_error() -> None:
    desk = running()
    raises(desk, "w0", step=9)
    names = [c.event for c in desk.log if hasattr(c, "event")]
    assert names.index("user_error") > max(
        i for i, name in enumerate(names) if name == "step_committed"
    )


def test_an_injected_crash_costs_its_node_and_only_the_last_one_ends_the_run() -> None:
    desk = running()
    raises(desk, "w2", on_purpose=True)
    raises(desk, "w1", on_purpose=True)
    assert [e["node"] for e in desk.events("node_lost")] == [2, 1]
    assert not desk.events("run_finished")
    raises(desk, "w0", on_purpose=True)
    assert end_of(desk) == ("failed", "user_code")


def test_a_joiner_that_raises_is_refused_alone() -> None:
    desk = running(join_debounce_s=60.0)
    desk.committed["w3"] = 0
    desk.held["w3"] = ()
    desk.say("w3", desk.hello("w3"))
    raises(desk, "w3", step=0)
    assert desk.state.phase is Phase.RUNNING
    assert not desk.events("run_finished")
    assert desk.events("user_error")[0]["node"] == 3


def test_an_error_of_our_own_is_its_nodes_until_a_second_node_has_it() -> None:
    desk = running()
    raises(desk, "w2", cause=Cause.INTERNAL)
    assert [e["node"] for e in desk.events("node_lost")] == [2]
    assert not desk.events("user_error")
    raises(desk, "w1", cause=Cause.INTERNAL)
    assert end_of(desk) == ("failed", "internal")
    assert failure_of(desk).error == "InternalError"


def test_the_second_process_that_ends_itself_at_a_step_makes_it_poisoned() -> None:
    """C3: found out at the second death, with the samples that both had."""
    desk = running()
    dies(desk, 2, sample_ids=(4, 9), place="t.py:3 in loss")
    assert desk.state.phase is Phase.RUNNING
    assert [e["cause"] for e in desk.events("worker_died")] == ["SIGSEGV"]
    dies(desk, 1, sample_ids=(9,), place="t.py:3 in loss")
    assert end_of(desk) == ("failed", "user_code")
    failure = failure_of(desk)
    assert failure.error == "PoisonedStepError"
    assert failure.sample_ids == (9,)
    assert "poisoned step 9" in failure.message and "t.py:3" in failure.message


@pytest.mark.parametrize("cause", ["SIGKILL", "ray: ActorDiedError"])
def test_two_deaths_from_outside_are_two_losses(cause: str) -> None:
    desk = running(nodes=5)
    dies(desk, 4, cause)
    dies(desk, 3, cause)
    assert desk.state.phase is Phase.RUNNING
    dies(desk, 2, cause)  # the third attempt at one step
    assert end_of(desk) == ("failed", "user_code")


def hangs(desk: Desk, number: int, **note: Any) -> None:
    """One thread stands still while the others wait for it, until its process is ended."""
    while f"w{number}" in desk.state.roster.workers:
        for worker in desk.state.standing.seats:
            waits = worker != f"w{number}"
            beat = Heartbeat(generation=desk.state.resumed, step=9, waiting=waits)
            desk.say(worker, beat)
        desk.tick(1.0)
    dies(desk, number, "SIGKILL", **note)


def test_a_loop_without_end_costs_two_nodes_and_ends_as_the_users() -> None:
    """The second node whose thread stands still in the same function was not a bad machine."""
    desk = running(nodes=5)
    hangs(desk, 4, sample_ids=(9, 11), place="t.py:3 in loss")
    assert desk.state.phase is Phase.RUNNING
    hangs(desk, 3, sample_ids=(8, 9), place="t.py:3 in loss")
    assert end_of(desk) == ("failed", "user_code")
    failure = failure_of(desk)
    assert failure.error == "PoisonedStepError" and failure.sample_ids == (9,)
    assert "forward at t.py:3 in loss stood still on 2 nodes" in failure.message
    assert [e["cause"] for e in desk.events("node_lost")] == ["no progress"] * 2


def test_a_thread_that_stands_still_in_our_own_code_is_no_more_than_a_loss() -> None:
    desk = running(nodes=5)
    for number in (4, 3, 2):
        hangs(desk, number, phase="")
    assert desk.state.phase is Phase.RUNNING


def test_a_commit_between_two_deaths_makes_them_two_losses() -> None:
    desk = running()
    dies(desk, 2)
    desk.commit(9)
    dies(desk, 1)
    assert desk.state.phase is Phase.RUNNING


def test_faults_on_purpose_poison_nothing() -> None:
    desk = running(nodes=4)
    for number in (3, 2, 1):
        body = Injected(kind="kill", node_key=f"n{number}", spec="chaos:kill")
        desk.feed(DriverSaid(body=body, at_s=desk.now_s))
        dies(desk, number, "SIGSEGV")
    assert desk.state.phase is Phase.RUNNING
    assert not desk.state.blame.deaths


def test_a_death_outside_the_users_functions_and_one_told_twice_count_for_nothing() -> None:
    desk = running(nodes=4)
    dies(desk, 3, phase="")
    dies(desk, 2, phase="")
    assert not desk.state.blame.deaths
    dies(desk, 1)
    body = WorkerDied(worker="n1.0", cause="SIGSEGV", step=9, phase="forward", generation=3)
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    assert len(desk.state.blame.deaths) == 1


def test_what_the_driver_cannot_go_on_with_ends_the_run_as_that() -> None:
    desk = running()
    failure = Failure(cause=Cause.USER_CODE, error="UserCodeError", message="callback")
    desk.feed(DriverSaid(body=StopRun(now=True, failure=failure), at_s=desk.now_s))
    assert end_of(desk) == ("failed", "user_code")


def test_a_driver_that_is_gone_is_no_request() -> None:
    desk = running()
    desk.feed(DriverGone(at_s=desk.now_s))
    assert end_of(desk) == ("short", "node")


def word_of(desk: Desk, number: int, cause: str = "SIGKILL", *, generation: int) -> None:
    """The launcher tells how a process ended whose stream has ended before."""
    note = {"generation": generation, "step": desk.state.step + 1, "phase": "forward"}
    body = WorkerDied(worker=f"n{number}.0", cause=cause, **note)
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))


def test_a_third_attempt_that_ended_is_not_followed_by_a_fourth_before_the_launcher_spoke() -> None:
    """C3: streams end before the launcher tells how; the fourth node is not risked meanwhile."""
    desk = running(nodes=6)
    dies(desk, 5, "SIGKILL")
    dies(desk, 4, "SIGKILL")
    generation = desk.state.resumed
    desk.lose("w3")
    assert desk.state.phase is Phase.PREPARING and desk.state.resumed == generation
    desk.tick()
    assert desk.state.phase is Phase.PREPARING, "everybody is ready, and nobody is sent"
    word_of(desk, 3, generation=generation)
    assert end_of(desk) == ("failed", "user_code")
    assert [e["node"] for e in desk.events("node_lost")] == [5, 4, 3]


def test_news_that_come_one_attempt_late_still_save_the_fourth_node() -> None:
    desk = running(nodes=6)
    dies(desk, 5, "SIGKILL")
    second = desk.state.resumed
    desk.lose("w4")
    third = desk.state.resumed
    assert desk.state.phase is Phase.RUNNING, "the second attempt may well be a chance"
    desk.lose("w3")
    assert desk.state.phase is Phase.PREPARING
    word_of(desk, 4, generation=second)
    assert desk.state.phase is Phase.PREPARING
    word_of(desk, 3, generation=third)
    assert end_of(desk) == ("failed", "user_code")


def test_a_launcher_that_has_told_of_none_of_three_attempts_is_heard_first() -> None:
    desk, seen = running(nodes=6), []
    for number in (5, 4, 3):
        seen.append(desk.state.resumed)
        desk.lose(f"w{number}")
    assert desk.state.phase is Phase.PREPARING
    for number, generation in zip((5, 4, 3), seen, strict=True):
        word_of(desk, number, generation=generation)
    assert end_of(desk) == ("failed", "user_code")


def test_a_word_that_shows_nothing_lets_the_step_be_tried_at_once() -> None:
    desk = running(nodes=6)
    dies(desk, 5, "SIGKILL")
    dies(desk, 4, "SIGKILL")
    generation = desk.state.resumed
    desk.lose("w3")
    note = {"generation": generation, "step": 9, "phase": ""}  # in none of the user's functions
    body = WorkerDied(worker="n3.0", cause="SIGKILL", **note)
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    assert desk.state.phase is Phase.RUNNING and desk.state.resumed == generation + 1


def test_a_launcher_that_never_speaks_holds_the_step_up_for_the_stall_and_no_longer() -> None:
    desk = running(nodes=6, timeouts=derive_timeouts(3.0))
    dies(desk, 5, "SIGKILL")
    dies(desk, 4, "SIGKILL")
    desk.lose("w3")
    since, waited_s = desk.now_s, 0.0
    while desk.state.phase is Phase.PREPARING:
        for worker in desk.state.roster.workers:
            desk.say(worker, Heartbeat(generation=1, step=8))
        desk.tick(0.2)
        waited_s = desk.now_s - since
    assert desk.state.phase is Phase.RUNNING and 3.0 < waited_s < 3.5
    assert len(desk.events("node_lost")) == 3


def test_a_zone_that_goes_at_once_is_healed_without_a_wait() -> None:
    desk = running(nodes=6)
    dies(desk, 5, "SIGKILL")
    desk.deaf = {"Fence"}
    desk.lose("w4", "w3", "w2")
    desk.deaf = set()
    for worker in ("w0", "w1"):
        report = Report(generation=desk.state.generation, committed=8, prepared=8, entered=2)
        desk.say(worker, report)
    assert desk.state.phase is Phase.RUNNING


def test_after_a_crash_of_its_own_the_second_loss_waits_for_the_launcher() -> None:
    desk = running(nodes=4)
    dies(desk, 3, "SIGSEGV")
    generation = desk.state.resumed
    desk.lose("w2")
    assert desk.state.phase is Phase.PREPARING
    word_of(desk, 2, "SIGSEGV", generation=generation)
    assert end_of(desk) == ("failed", "user_code")


def test_the_launchers_word_on_a_death_is_awaited_unless_a_scripted_fault_struck_that_node() -> (
    None
):
    desk = running(nodes=4, slots_per_node=3, min_replicas=3)
    desk.state = replace(
        desk.state, injected=replace(desk.state.injected, struck=frozenset({("n1.0", 1)}))
    )
    desk.lose("w1")
    assert not desk.state.blame.unexplained
    desk.lose("w2")
    assert [gone.worker for gone in desk.state.blame.unexplained] == ["n2.0"]

"""A member that is lost because what it said was thrown away is no failed node: event scripts."""

from __future__ import annotations

import json

from control_desk import Desk, journal_of, running
from control_journal import resumed_state
from msgspec.structs import replace as changed

from lazarus.control.cluster.state import Phase
from lazarus.control.messages import Heartbeat, Paused, Report, WorkerDied
from lazarus.control.ports import DriverSaid, Garbled, TellDriver
from lazarus.failure import Cause, Failure


def overdue(desk: Desk, *silent: str) -> None:
    """Time passes for longer than the tolerated stall; all but some are heard of meanwhile."""
    for _ in range(2 + int(desk.state.config.timeouts.report_s)):
        for worker in desk.state.roster.workers:
            if worker not in silent:
                desk.say(worker, beat(desk, worker))
        desk.tick(1.0)
        if desk.state.phase is Phase.ENDED:
            return


def beat(desk: Desk, worker: str) -> Heartbeat:
    moving = int(desk.now_s * 10) if worker not in desk.stuck else 0  # type: ignore[attr-defined]
    return Heartbeat(generation=1, step=desk.state.step, progress=moving)


def fencing(*, nodes: int = 5, bad: tuple[str, ...] = ("w1",)) -> Desk:
    """A node is lost; the reports of some of the others are of a step that cannot be."""
    desk = running(nodes=nodes)
    desk.stuck = set(bad)  # type: ignore[attr-defined]
    desk.deaf = {"Fence"}
    desk.lose(f"w{nodes - 1}")
    desk.deaf = set()
    generation = desk.state.generation
    for worker in sorted(desk.state.roster.workers):
        report = Report(generation=generation, committed=8, prepared=8, entered=1)
        odd = worker in bad
        desk.say(worker, changed(report, committed=1 << 40) if odd else report)
    assert desk.state.phase is Phase.FENCING
    return desk


def failure_of(desk: Desk) -> Failure:
    (over,) = [c.body for c in desk.of(TellDriver) if type(c.body).__name__ == "RunOver"]
    return over.failure


def test_a_member_whose_report_was_refused_is_lost_through_our_own_fault() -> None:
    desk = fencing()
    overdue(desk)
    lost = desk.events("node_lost")[-1]
    assert lost["node"] == 1
    assert lost["cause"].startswith("Lazarus failed: Report of its worker was refused: step 1099")
    (event,) = desk.events("internal_error")
    assert (event["node"], event["rank"], event["step"], event["phase"]) == (1, 1, 9, "fencing")
    assert desk.state.phase is Phase.RUNNING and desk.state.blame.raised == ((1, 9),)
    assert not desk.state.rejected.dropped, "a RESUME forgets it"


def test_the_second_member_that_we_do_not_understand_ends_the_run_as_internal() -> None:
    """All others would follow: nobody shall read that the machines have failed."""
    desk = fencing(bad=("w1", "w2"))
    overdue(desk)
    (end,) = desk.events("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "internal")
    failure = failure_of(desk)
    assert (failure.cause, failure.error) == (Cause.INTERNAL, "InternalError")
    assert "Report of its worker was refused" in failure.message
    assert [e["node"] for e in desk.events("node_lost")] == [4, 1]


def test_where_too_few_are_left_the_first_one_ends_it() -> None:
    desk = fencing(nodes=2, bad=("w0",))
    overdue(desk)
    (end,) = desk.events("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "internal")


def test_bytes_that_are_no_message_count_as_well() -> None:
    desk = running(nodes=4)
    desk.stuck = set()  # type: ignore[attr-defined]
    desk.feed(Garbled(worker="w2", reason="no FromWorker", at_s=desk.now_s))
    overdue(desk, "w2")
    (lost,) = desk.events("node_lost")
    assert lost["cause"] == "Lazarus failed: bytes of its worker was refused: no FromWorker"


def test_who_says_it_properly_later_has_nothing_missing() -> None:
    desk = running(nodes=4)
    desk.stuck = set()  # type: ignore[attr-defined]
    desk.say("w2", Paused(generation=1, step=101))
    assert desk.state.rejected.dropped == {"w2": ("Paused", "step 101 of 100")}
    desk.say("w2", Paused(generation=1, step=8))
    assert not desk.state.rejected.dropped
    overdue(desk, "w2")
    assert desk.events("node_lost")[0]["cause"] == "no heartbeat"


def test_a_silent_node_that_was_always_understood_is_a_lost_node() -> None:
    desk = running(nodes=4)
    desk.stuck = set()  # type: ignore[attr-defined]
    desk.say("w1", Paused(generation=1, step=101))
    overdue(desk, "w2")
    assert [e["cause"] for e in desk.events("node_lost")] == ["no heartbeat"]
    assert not desk.events("internal_error")


def test_a_member_that_is_sent_away_when_it_comes_back_was_sent_away_by_us() -> None:
    """The controller restarts, and takes the hello of one of the old members for nonsense."""
    desk, name = running(nodes=4), "n1.0"  # a worker is named after its node
    entries = json.loads(json.dumps(journal_of(desk)).replace('"w1"', f'"{name}"'))
    desk.state = resumed_state(entries, desk.state.config, now_s=desk.now_s)
    desk.feed(Garbled(worker=name, reason="a number below 0", message="Hello", at_s=desk.now_s))
    assert desk.state.rejected.dropped == {name: ("Hello", "a number below 0")}
    desk.feed(DriverSaid(body=WorkerDied(worker=name, cause="exit code 1"), at_s=desk.now_s))
    (lost,) = desk.events("node_lost")
    assert lost["cause"] == "Lazarus failed: its hello was refused: a number below 0"

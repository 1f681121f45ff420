"""Messages that come too late change nothing; the end of the run says how many there were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from control_desk import Desk, running
from msgspec.structs import replace as changed

from lazarus.control.cluster.state import Phase
from lazarus.control.membership.suspicion import culprit
from lazarus.control.messages import (
    Body,
    DigestItem,
    DigestPart,
    Evaluated,
    Finalized,
    Paused,
    Ready,
    Repaired,
    Report,
    StopRun,
    Suspicion,
)
from lazarus.control.ports import DriverSaid

DIGEST = DigestItem(name="x", sha256=bytes(32))

LATE: dict[str, Callable[[Desk], Body]] = {
    "a vector of a generation that is over": lambda desk: changed(desk.vector(9), generation=1),
    "a vector of a step that is committed": lambda desk: desk.vector(8),
    "a report when nobody asks for one": lambda desk: Report(generation=2, committed=8, prepared=8),
    "an alignment when nobody aligns": lambda desk: desk.aligned("w0", 2),
    "a ready when nothing is prepared": lambda desk: Ready(generation=2, plan_digest="x"),
    "a pause of a generation that is over": lambda desk: Paused(generation=1, step=8),
    "a suspicion of a generation that is over": lambda desk: Suspicion(generation=1, step=8),
    "a digest of a generation that is over": lambda desk: DigestPart(
        generation=1, step=8, items=(DIGEST,)
    ),
    "a repair of a generation that is over": lambda desk: Repaired(
        generation=1, step=8, layer=0, expert=0, ranks=(1,)
    ),
    "the end of a generation that is over": lambda desk: Finalized(generation=1, step=8),
    "an evaluation of a generation that is over": lambda desk: Evaluated(generation=1, step=8),
}


def second_generation() -> Desk:
    desk = running(nodes=4, slots_per_node=2, min_replicas=2)
    desk.lose("w3")
    assert desk.state.resumed == 2 and desk.state.rejected.stale == 0
    return desk


@pytest.mark.parametrize("what", LATE)
def test_what_comes_too_late_is_counted_and_changes_nothing(what: str) -> None:
    desk = second_generation()
    before = desk.state
    for _ in range(2):
        desk.say("w0", LATE[what](desk))
    after = desk.state
    assert (after.phase, after.step, after.generation) == (Phase.RUNNING, 8, 2)
    assert (after.committed.known, after.pausing.paused, after.blame.suspicion_s) == ({}, {}, None)
    assert after.ending.digests == before.ending.digests and not desk.events("replica_repaired")
    desk.feed(DriverSaid(body=StopRun(now=True), at_s=desk.now_s))
    (end,) = desk.events("run_finished")
    assert (end["stale_messages"], end["refused_messages"]) == (2, 0)


def test_who_is_no_member_is_not_heard() -> None:
    desk = second_generation()
    desk.say("w3", desk.vector(9))
    assert (desk.state.rejected.stale, desk.state.step) == (1, 8)


def test_a_message_in_time_is_not_counted_as_late() -> None:
    desk = second_generation()
    desk.commit(9)
    desk.say("w0", Suspicion(generation=2, step=9))
    desk.tick(0.2)
    assert desk.state.resumed == 3 and desk.state.rejected.stale == 0


def test_further_suspicions_do_not_put_off_what_the_first_one_began() -> None:
    desk = second_generation()
    desk.say("w0", Suspicion(generation=2, step=8))
    desk.tick(0.06)
    desk.say("w1", Suspicion(generation=2, step=8))
    assert desk.state.generation == 2
    desk.tick(0.05)
    assert desk.state.generation == 3


def test_the_culprit_of_broken_links_is_somebody_who_is_there() -> None:
    told = ((1, 2), (2, 3), (2, 4))
    assert culprit(told, alive={1, 2, 3, 4}) == 2
    assert culprit(told, alive={1, 3, 4}) == 3
    assert culprit(((0, 5), (0, 5)), alive={0, 5}) == 5  # of a pair the higher serial
    assert culprit(told, alive={7}) is None
    assert culprit((), alive={1}) is None

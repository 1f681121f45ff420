"""The last checkpoint where storage refuses: held, tried elsewhere, and said."""

from __future__ import annotations

import json

from control_desk import Desk, running

from lazarus.control.cluster.state import Phase
from lazarus.control.messages import (
    DigestItem,
    DigestPart,
    Finalize,
    Finalized,
    Paused,
    Prepare,
    Ready,
    RunOver,
    StopRun,
    StorageProblem,
    Suspicion,
)
from lazarus.control.ports import DriverSaid, DropFiles, ManifestDone, TellDriver, WriteManifest
from lazarus.failure import Cause

FULL = StorageProblem(url="/ckpt", operation="write", reason="No space left", is_full=True)
SHARE = json.dumps({"files": [{"path": "step-00000008/a"}], "layers": []})


def finalizing(**config: object) -> Desk:
    desk = running(**{"steps": 8, "rescue_url": "/run/rescue", **config})
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=desk.state.resumed, step=8))
    assert desk.state.phase is Phase.FINALIZING
    return desk


def answer(desk: Desk, url: str = "", *, problem: StorageProblem | None = None) -> None:
    """Every rank's share is durable; that of the last one may not be."""
    generation, last = desk.state.resumed, desk.state.standing.seats[-1]
    for worker in desk.state.standing.seats:
        if not url:
            items = (DigestItem(name=worker, sha256=b"x" * 32),)
            desk.say(worker, DigestPart(generation=generation, step=8, items=items))
        bad = problem if worker == last else None
        body = Finalized(
            generation=generation,
            step=8,
            url=url,
            files="" if bad else SHARE,
            num_bytes=1 << 20,
            problem=bad,
        )
        desk.say(worker, body)


def over(desk: Desk) -> RunOver:
    (found,) = [c.body for c in desk.of(TellDriver) if isinstance(c.body, RunOver)]
    return found


def written(desk: Desk, *, problem: StorageProblem | None = None) -> None:
    error = "" if problem is None else problem.reason
    standing = ((desk.state.resumed, 8, True),)
    desk.feed(
        ManifestDone(
            generation=desk.state.resumed,
            step=8,
            at_s=desk.now_s,
            final=True,
            standing=standing,
            error=error,
            problem=problem,
        )
    )


def test_a_share_that_cannot_be_written_goes_to_the_rescue_folder() -> None:
    desk = finalizing()
    answer(desk, problem=FULL)
    orders = [body for body in desk.told(Finalize) if body.url]
    assert {o.url for o in orders} == {"/run/rescue"} and len(orders) == len(
        desk.state.standing.seats
    )
    assert desk.of(DropFiles)[0].paths == ("step-00000008/a",) * 2
    answer(desk, "/run/rescue")
    assert desk.of(WriteManifest)[-1].url == "/run/rescue"
    written(desk)
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert end.failure.cause is Cause.STORAGE and "/run/rescue" in end.failure.message
    assert (end.failure.url, end.failure.operation) == ("/ckpt", "write")


def test_a_manifest_that_cannot_be_written_goes_there_too() -> None:
    desk = finalizing()
    answer(desk)
    written(desk, problem=FULL)
    assert [body.url for body in desk.told(Finalize)][-1] == "/run/rescue"


def test_where_both_places_refuse_the_end_says_what_to_do() -> None:
    desk = finalizing()
    answer(desk, problem=FULL)
    answer(desk, "/run/rescue", problem=FULL)
    end = over(desk)
    assert end.status == "failed" and end.failure is not None
    assert "3.0 MiB" in end.failure.message and "checkpoint.url" in end.failure.way_out
    (finished,) = desk.events("run_finished")
    assert finished["cause"] == "storage" and finished["state_digest"]


def test_with_a_checkpoint_that_stands_the_run_can_be_resumed() -> None:
    desk = running(steps=8, rescue_url="")
    desk.written(4)
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=desk.state.resumed, step=8))
    answer(desk, problem=FULL)
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert "of step 4" in end.failure.way_out


def test_a_late_answer_to_the_first_order_does_not_count_for_the_second() -> None:
    desk = finalizing()
    answer(desk, problem=FULL)
    before = desk.state.rejected.stale
    desk.say(
        desk.state.standing.seats[0], Finalized(generation=desk.state.resumed, step=8, files=SHARE)
    )
    assert desk.state.rejected.stale == before + 1 and not desk.state.ending.finalized


def test_a_place_that_a_node_cannot_use_ends_the_run_before_its_first_step() -> None:
    """C5: with the node, the URL and what was asked."""
    desk = Desk(probes_place=True)
    assert desk.state.phase is Phase.RUNNING  # all could use it
    desk = Desk(probes_place=True, steps=100, deaf_at_first=("Prepare",))
    generation = desk.state.generation
    plan = desk.state.transition.plan  # type: ignore[union-attr]
    for worker in ("w0", "w1", "w2"):
        place = FULL if worker == "w1" else None
        digest = plan.digest if plan else ""
        desk.say(worker, Ready(generation=generation, plan_digest=digest, place=place))
    end = over(desk)
    assert end.status == "failed" and end.failure is not None
    assert end.failure.cause is Cause.STORAGE and "from node 1:" in end.failure.message
    assert not desk.events("node_lost") and not desk.events("step_committed")


def test_storage_that_refuses_a_restore_is_no_reason_to_forget_an_expert() -> None:
    """C6: no other source is left, so the run ends as a storage failure that can be resumed."""
    desk = running()
    desk.written(6)
    desk.deaf.add("Prepare")
    desk.lose("w2")
    restore = desk.state.transition.restores[0]  # type: ignore[union-attr]
    expert = f"L{restore.layer}/E{restore.expert}"
    refused = Suspicion(
        generation=desk.state.generation,
        step=8,
        bad_source=f"storage {expert}",
        error="read s3://b/x: 503",
        storage_url="s3://b/x",
        operation="read",
    )
    desk.say("w0", refused)
    end = over(desk)
    assert end.status == "short" and end.failure is not None
    assert (end.failure.cause, end.failure.url) == (Cause.STORAGE, "s3://b/x")


def test_a_stop_below_quorum_saves_what_the_survivors_hold() -> None:
    """R13: nobody trains a step for it."""
    desk = running(nodes=3, min_nodes=3, slots_per_node=3)
    desk.lose("w2")
    assert desk.state.phase is Phase.HOLDING
    desk.feed(DriverSaid(body=StopRun(reason="SIGTERM"), at_s=desk.now_s))
    assert desk.state.phase is Phase.RUNNING
    assert {order.halt for order in desk.told(type(desk.last_resume()))[-2:]} == {True}
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=desk.state.resumed, step=8))
    assert desk.state.phase is Phase.FINALIZING and desk.state.step == 8


def test_only_the_first_nodes_try_the_place() -> None:
    """A joiner may come while storage does not answer: nobody who trains waits for it."""
    desk = running(probes_place=True, steps=100, join_debounce_s=0.0)
    desk.committed["w3"] = desk.entered["w3"] = 0
    desk.held["w3"] = ()
    desk.say("w3", desk.hello("w3"))
    desk.commit(9)
    for seat in desk.state.standing.seats:
        desk.say(seat, Paused(generation=desk.state.resumed, step=9))
    orders = desk.told(Prepare)
    assert {order.probe for order in orders if order.generation == 1} == {True}
    assert {order.probe for order in orders if order.generation == 2} == {False}
    assert any(order.dense_targets for order in orders), "nobody joined"


def test_a_node_that_cannot_use_the_place_later_on_ends_nothing() -> None:
    """A checkpoint that fails says so; the run has state in memory to go on with."""
    desk = running(probes_place=True, steps=100, slots_per_node=2, min_replicas=2)
    desk.deaf.add("Prepare")
    desk.lose("w2")
    transition = desk.state.transition
    assert transition is not None and transition.plan is not None
    for worker in ("w0", "w1"):
        digest = transition.plan.digest
        desk.say(worker, Ready(generation=2, plan_digest=digest, place=FULL))
    assert desk.state.phase is Phase.RUNNING


def test_what_the_rescue_folder_could_not_take_drops_nothing_from_the_first_place() -> None:
    """The shares have the same names there."""
    desk = finalizing()
    answer(desk, problem=FULL)
    dropped = len(desk.of(DropFiles))
    answer(desk, "/run/rescue", problem=FULL)
    assert over(desk).failure is not None
    assert len(desk.of(DropFiles)) == dropped > 0


def test_who_wrote_the_last_checkpoint_is_not_needed_while_its_manifest_is_written() -> None:
    desk = finalizing()
    answer(desk)
    desk.tick(11.0)  # nobody has said anything for longer than the tolerated stall
    assert desk.state.phase is Phase.FINALIZING
    written(desk)
    assert over(desk).status == "finished"

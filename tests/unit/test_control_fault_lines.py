"""Who is at fault where collectives break, processes die or ranks part: case by case."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_desk import (
    CALM,
    REPLICATED,
    Desk,
    S,
    journal_of,
    over,
    running,
)
from control_journal import resumed_state
from msgspec.structs import replace as changed

from lazarus.control.cluster.poison import HUNG, awaited
from lazarus.control.cluster.state import Phase
from lazarus.control.membership import suspicion
from lazarus.control.messages import (
    Align,
    Aligned,
    Injected,
    InjectFault,
    ReplicaMismatch,
    Report,
    Suspicion,
    Tail,
    TensorSum,
    UserError,
    WorkerDied,
)
from lazarus.control.parts.blame import Death, Gone
from lazarus.control.ports import DriverSaid, Tell
from lazarus.control.reconfiguration.parting import models_differ, ranks_parted
from lazarus.failure import Cause


def complain(desk: Desk, *workers: str, **more: Any) -> None:
    steady = desk.state.phase in (Phase.RUNNING, Phase.RECONNECTING)
    generation = desk.state.resumed if steady else desk.state.generation
    for worker in workers:
        desk.say(worker, Suspicion(generation=generation, step=9, **more))


def test_a_pair_that_breaks_three_times_loses_its_higher_node() -> None:
    desk = running(nodes=4, **REPLICATED)
    for times in (1, 2, 3):
        assert len(desk.state.standing.members) == 4
        complain(desk, "w1", "w1", "w2", "w0", "w3")  # the other ranks fail because of these two
        assert desk.state.blame.complaints == (1, 2, 0, 3)
        desk.tick(1.01 * desk.state.config.timeouts.suspicion_grace_s)
        assert len(desk.state.blame.errors) == times or times == 3
    (event,) = desk.events("node_lost")
    assert (event["node"], event["cause"]) == (2, suspicion.AGAIN)


def test_trouble_with_the_store_points_to_nobody_and_ends_the_run_in_the_end() -> None:
    desk = running(**REPLICATED)
    for _ in range(suspicion.MAX_ATTEMPTS):
        assert desk.state.phase is Phase.RUNNING
        complain(desk, "w0", store=True)
        assert desk.state.blame.complaints == ()
        desk.tick(1.01 * desk.state.config.timeouts.suspicion_grace_s)
    failure = over(desk).failure
    assert failure is not None and failure.cause is Cause.INTERNAL
    assert "broke 10 times in a row" in failure.message and not desk.events("node_lost")


def test_a_commit_between_errors_starts_their_count_anew() -> None:
    desk = running(nodes=4, **REPLICATED)
    for step in range(9, 14):
        complain(desk, "w1", "w2")
        desk.tick(1.01 * desk.state.config.timeouts.suspicion_grace_s)
        desk.commit(step)
    assert not desk.events("node_lost") and desk.state.blame.errors == ()


def test_a_complaint_of_another_attempt_is_only_counted() -> None:
    desk = running(**REPLICATED)
    desk.say("w0", Suspicion(generation=0, step=8))
    assert desk.state.rejected.stale == 1 and desk.state.blame.suspicion_s is None
    desk.deaf = {"Fence"}
    desk.lose("w2")
    desk.say("w0", Suspicion(generation=2, step=8))
    assert desk.state.rejected.stale == 2  # while reports are awaited there is no collective
    late = running(**REPLICATED)
    late.deaf = {"Prepare"}
    late.lose("w2")
    late.say("w0", Suspicion(generation=late.state.generation - 1, step=8))
    assert late.state.rejected.stale == 1 and late.state.blame.suspicion_s is None
    complain(late, "w0")
    assert late.state.blame.complaints == (0,) and late.state.blame.suspicion_s == late.now_s


def test_a_copy_that_cannot_be_read_is_never_chosen_again() -> None:
    desk = running(**REPLICATED)
    desk.say("w0", Suspicion(generation=1, step=8, bad_source="storage L0/E1"))
    assert desk.state.storage.bad_sources == {"storage L0/E1"} and desk.state.resumed == 1
    assert desk.state.storage.refused == frozenset()
    desk.deaf = {"Prepare"}
    desk.lose("w2")
    body = Suspicion(generation=1, step=8, bad_source="keeper:a", storage_url="s3://b",
                     operation="read", error="denied")  # fmt: skip
    desk.say("w0", body)
    assert desk.state.storage.refusal == ("s3://b", "read", "denied")
    assert desk.state.storage.refused == {"keeper:a"} and desk.state.generation == 2
    desk.say("w0", changed(body, generation=2))
    assert desk.state.generation == 3  # it was being read
    start = Desk(nodes=2, deaf_at_first=("Prepare",))
    start.say("w0", changed(body, generation=1))
    failure = over(start).failure
    assert failure is not None and failure.message == "cannot start: denied"
    assert (over(start).status, failure.url) == ("failed", "s3://b")


def gone(number: int, **more: Any) -> Gone:
    return Gone(**({"worker": f"n{number}.0", "generation": number, "step": 9, "at_s": 0.0} | more))


def died(number: int, signature: str = "", **more: Any) -> Death:
    fields = {"generation": number, "step": 9, "phase": "forward"} | more
    return Death(worker=f"n{number}.0", node=f"n{number}", signature=signature, **fields)


def test_a_word_is_awaited_only_if_it_could_show_a_bug() -> None:
    one, two, three = gone(1), gone(2), gone(3)
    assert awaited((), (one,), step=8) == () == awaited((died(1, "SIGSEGV"),), (), step=8)
    assert awaited((died(1, "SIGSEGV"),), (two,), step=8) == (two,)
    assert awaited((died(2, "SIGSEGV"),), (two,), step=8) == ()
    assert awaited((died(1), died(2)), (three,), step=8) == (three,)
    assert awaited((died(1), died(1)), (three,), step=8) == ()
    assert awaited((died(1), died(2)), (gone(3, generation=2),), step=8) == ()
    assert awaited((died(1, "SIGSEGV"),), (gone(2, step=8),), step=8) == ()
    assert awaited((died(1, "SIGSEGV", step=8),), (two,), step=8) == ()
    assert awaited((died(1, "SIGSEGV"),), (two, gone(3, step=8)), step=8) == (two,)


def test_a_thread_that_stood_still_is_taken_for_no_crash() -> None:
    desk = running(nodes=4, **CALM)
    for number in (3, 2):
        waits = {f"w{i}" for i in range(number)}
        for _ in range(8):
            for worker in tuple(desk.state.roster.workers):
                desk.say(worker, desk.beat(waiting=worker in waits))
            desk.tick(S / 4)
        assert desk.events("node_lost")[-1]["cause"] == HUNG
        note = WorkerDied(worker=f"n{number}.0", cause="SIGKILL", generation=desk.state.resumed - 1,
                          step=9, phase="forward")  # fmt: skip
        desk.feed(DriverSaid(body=note, at_s=desk.now_s))
    failure = over(desk).failure
    assert failure is not None and failure.error == "PoisonedStepError"
    assert "stood still on 2 nodes one after the other" in failure.message


def tail(*labels: str, last: int, group: str = "g", places: tuple[str, ...] = ()) -> Tail:
    return Tail(group=group, last=last, labels=labels, places=places, place="user.py:1", step=9)


def test_ranks_part_where_their_exchanges_differ_first() -> None:
    def parted(*tails: Tail) -> Any:
        found = [Report(generation=2, committed=8, prepared=9, tail=one) for one in tails]
        reports = {f"w{i}": report for i, report in enumerate(found)}
        return ranks_parted(reports, [f"w{i}" for i in range(len(tails))])

    assert parted(tail(last=0), tail(last=0)) is None
    same = tail("a #1", "b #2", last=2)
    assert parted(same, same, tail("a #1", last=1)) is None
    assert parted(same, tail("b #2", "c #3", last=3)) is None
    other = tail("a #1", "x #2", last=2, places=("m.py:4", "m.py:5"))
    found = parted(same, other, same)
    assert found.rank == 1 and found.place == "m.py:5" and found.step == 9
    assert found.message.endswith("ranks 0, 2 at b (user.py:1); rank 1 at x (m.py:5)")
    first = parted(tail("a #1", last=1), tail("x #1", last=1, places=("m.py:4",)))
    assert first.message.endswith("rank 0 at a (user.py:1); rank 1 at x (m.py:4)")
    assert parted(same, tail("x #2", last=2, group="h")) is None
    stranger = Report(generation=2, committed=8, prepared=9, tail=other)
    assert ranks_parted({"w7": stranger, "w0": changed(stranger, tail=same)}, ["w0"]) is None
    many = parted(*[same] * 9, other)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all) at b" in many.message


def test_models_that_differ_at_the_start_are_told_apart() -> None:
    def sums(**tensors: tuple[str, int]) -> Aligned:
        found = tuple(TensorSum(name=n, kind=k, sum=s) for n, (k, s) in tensors.items())
        return Aligned(generation=1, step=0, tensors=found, place="build.py:3")

    def differ(*bodies: Aligned) -> Any:
        workers = [f"w{i}" for i in range(len(bodies))]
        return models_differ(dict(zip(workers, bodies, strict=True)), workers)

    one = sums(a=("f32 [2]", 5), b=("f32 [3]", 6))
    assert differ(one, one) is None
    values = differ(one, one, sums(a=("f32 [2]", 5), b=("f32 [3]", 7)))
    assert values.message.endswith("b has other values on rank 2 than on ranks 0, 1")
    kinds = differ(one, sums(a=("f32 [2]", 5), b=("f64 [3]", 6)))
    assert kinds.message.endswith("b is f32 [3] on rank 0, f64 [3] on rank 1")
    missing = differ(sums(a=("f32 [2]", 5)), one)
    assert missing.message.endswith("b is missing on rank 0, f32 [3] on rank 1")
    assert (missing.phase, missing.place) == ("build", "build.py:3")


def test_a_poisoned_step_without_known_samples_names_none() -> None:
    desk = running(**REPLICATED)
    for number in (2, 1):
        desk.lose(f"w{number}")
        note = WorkerDied(worker=f"n{number}.0", cause="SIGSEGV", generation=desk.state.resumed,
                          step=9, phase="forward")  # fmt: skip
        desk.feed(DriverSaid(body=note, at_s=desk.now_s))
        desk.tick()
    failure = over(desk).failure
    assert failure is not None
    assert failure.message == (
        "poisoned step 9: forward ended the processes of 2 nodes one after the other "
        "(n2.0, n1.0: SIGSEGV)"
    )


def test_errors_of_lazarus_at_other_steps_are_other_errors() -> None:
    desk = running(nodes=4, **REPLICATED)
    desk.say("w3", UserError(generation=1, step=9, error="x", cause=Cause.INTERNAL))
    desk.commit(9)
    desk.say("w2", UserError(generation=2, step=10, error="x", cause=Cause.INTERNAL))
    assert [e["node"] for e in desk.events("node_lost")] == [3, 2]
    assert desk.state.blame.raised == ((3, 9), (2, 10)) and desk.state.phase is Phase.RUNNING
    few = running(min_nodes=3, **REPLICATED)
    few.say("w2", UserError(generation=1, step=9, error="x", cause=Cause.INTERNAL))
    assert over(few).status == "failed"  # without it too few would be left


def test_who_comes_back_to_a_controller_may_still_complain_of_the_old_generation() -> None:
    desk = running(**REPLICATED)
    claim = {"kind": "claim", "generation": 7, "members": [0, 1, 2]}
    state = resumed_state([*journal_of(desk), claim], desk.state.config, now_s=0.0)
    assert (state.phase, state.resumed, state.generation) == (Phase.RECONNECTING, 1, 7)
    desk.state = state
    desk.say("w0", changed(desk.hello("w0"), generation=1, fence=1))
    desk.say("w0", Suspicion(generation=7, step=8))
    assert desk.state.blame.suspicion_s is None and desk.state.rejected.stale == 1
    desk.say("w0", Suspicion(generation=1, step=8))
    assert desk.state.blame.complaints == (0,)


@pytest.mark.parametrize("stands", [True, False])
def test_a_run_that_stops_at_a_difference_says_how_to_go_on(stands: bool) -> None:
    desk = running(on_mismatch="stop", **REPLICATED)
    if stands:
        desk.written(4)
    what = json.dumps({"layer": 0, "expert": 1, "what": "L0/E1 differs"})
    desk.say("w0", ReplicaMismatch(generation=1, step=8, what=what))
    failure = over(desk).failure
    assert failure is not None and failure.message.endswith("is stop: L0/E1 differs")
    assert (failure.error, failure.way_out) == (
        ("StoppedError", "resume from a checkpoint of an earlier step")
        if stands
        else ("LazarusError", "no checkpoint stands to resume from; start again")
    )


def test_a_vector_that_one_rank_reported_counts_though_the_rank_dies() -> None:
    desk = running(nodes=4, **REPLICATED)
    said = desk.vector(9)
    desk.deaf = {"Fence"}
    desk.lose("w3")
    desk.say("w0", Report(generation=2, committed=9, prepared=9, entered=1, vectors=(said,)))
    assert list(desk.state.committed.known) == [9]
    desk.lose("w0")
    for worker in ("w1", "w2"):
        desk.say(worker, Report(generation=3, committed=8, prepared=9, entered=1))
    assert {body.step for body in desk.told(Align) if body.generation == 3} == {9}


def test_a_random_fault_counts_where_it_strikes_a_member() -> None:
    desk = running(nodes=4, join_debounce_s=60.0, **REPLICATED)
    desk.join("w4")
    for kind, key in (("kill", "n9"), ("kill", "n4"), ("slow", "n0"), ("crash", "n1"),
                      ("stop", "n2"), ("leave", "n3"), ("cut", "n3")):  # fmt: skip
        desk.feed(DriverSaid(body=Injected(kind=kind, node_key=key), at_s=desk.now_s))
    assert [e["node"] for e in desk.events("fault_injected")] == [None, 4, 0, 1, 2, 3, 3]
    assert set(desk.state.injected.fired) == {2, 3} and desk.state.injected.doomed == {1}
    orders = [c for c in desk.of(Tell) if isinstance(c.body, InjectFault)]
    assert [(c.worker, c.body.kind) for c in orders] == [
        ("w0", "slow"), ("w1", "crash"), ("w2", "stop"),
    ]  # fmt: skip

"""Each kind of malformed message is named for what is wrong with it, and changes nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from control_desk import Desk, running
from msgspec.structs import replace as changed

from lazarus.control.cluster.state import Control, Phase, fields_of
from lazarus.control.membership import checks
from lazarus.control.messages import (
    Aligned,
    Body,
    Evaluated,
    FaultFired,
    Fence,
    Heartbeat,
    Held,
    Hello,
    Injected,
    NodeNotice,
    Paused,
    ReplicaMismatch,
    Report,
    ShareReported,
    SnapshotHeld,
    StopRun,
    Suspicion,
    Vector,
)
from lazarus.control.ports import Disconnect, DriverSaid, Garbled, Publish, Tell
from lazarus.faults import KINDS


def refusal(desk: Desk, worker: str, body: Body) -> str:
    """Why a message is refused; it must change nothing but a counter and when it was heard."""
    before, said = desk.state, len(desk.log)
    desk.say(worker, body)
    after = desk.state
    assert after.rejected.num_refused == before.rejected.num_refused + 1
    assert after.rejected.dropped[worker][0] == type(body).__name__
    quiet = replace(
        after,
        rejected=replace(after.rejected, num_refused=before.rejected.num_refused),
        roster=replace(after.roster, workers=before.roster.workers),
    )
    quiet = replace(quiet, rejected=replace(quiet.rejected, dropped=before.rejected.dropped))
    assert changes(before, quiet) == set()
    (event,) = desk.log[said:]
    assert isinstance(event, Publish) and event.event == "message_refused"
    assert event.fields["worker"] == worker and event.fields["message"] == type(body).__name__
    return str(event.fields["reason"])


def changes(before: Control, after: Control) -> set[str]:
    known = fields_of(after)
    return {name for name, value in fields_of(before).items() if value is not known[name]} - {
        "config"
    }


def test_a_hello_from_a_place_that_does_not_exist_is_sent_away() -> None:
    desk = running(nodes=3)
    desk.deaf = {"Fenced"}
    nodes = desk.state.roster.nodes
    desk.say("w9", Hello(worker="w9", node_key="n9", local_rank=7))
    told, gone = desk.log[-2:]
    assert isinstance(told, Tell) and told.body.reason == "local rank 7 of 1"  # type: ignore[attr-defined]
    assert gone == Disconnect(worker="w9")
    assert desk.state.roster.nodes == nodes and desk.state.rejected.num_refused == 1


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello(worker="w1", node_key="n8"), "w1 belongs to another node"),
        (Hello(worker="w8", node_key="n1"), "local rank 0 of n1 is w1"),
        (Hello(worker="", node_key="n8"), "a hello without a name"),
        (Hello(worker="w8", node_key="n8", memory_bytes=-1), "a number below 0: -1"),
        (Hello(worker="w8", node_key="n8", pid=1 << 60), "Hello.pid is 1152921504606846976"),
        (Hello(worker="w8", node_key="n8", host="h" * 20_000), "Hello.host is a text of 20000"),
    ],
)
def test_a_hello_that_takes_anothers_name_or_place_is_sent_away(hello: Hello, reason: str) -> None:
    desk = running(nodes=3)
    desk.deaf = {"Fenced"}
    before = desk.state
    desk.say(hello.worker, hello)
    assert desk.log[-2].body.reason.startswith(reason)  # type: ignore[union-attr]
    assert (
        changes(before, replace(desk.state, rejected=replace(desk.state.rejected, num_refused=0)))
        == set()
    )


def lanes(desk: Desk, step: int) -> Vector:
    """The vector of a step, as the workers of the desk would send it, without its effect."""
    other = running(nodes=3)
    other.commit(step)
    assert other.state.committed.newest is not None
    return changed(other.state.committed.newest, at_s=0.0)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 2.0, "commit vector sums 2 members"),
        (1, 6.0, "a vector of (generation, step) (2, 9)"),
        (2, 30.0, "a vector of (generation, step) (1, 10)"),
        (3, -1.0, "lane samples is -1.0"),
        (4, np.inf, "lane count is inf"),
        (5, np.nan, "lane sample_hash is nan"),
        (10, np.nan, "the times of a vector are no numbers"),
        (13, -8.0, "the counts of a vector are no numbers"),
    ],
)
def test_a_vector_with_a_lane_that_cannot_be_is_refused(at: int, value: float, reason: str) -> None:
    desk = running(nodes=3)
    vector = lanes(desk, 9)
    odd = np.frombuffer(vector.lanes, dtype="<f8").copy()
    odd[at] = value
    assert refusal(desk, "w0", changed(vector, lanes=odd.tobytes())).startswith(reason)
    desk.say("w0", vector)  # the right one is taken after it
    desk.tick()
    assert desk.state.step == 9


def test_a_vector_of_another_length_or_of_a_step_that_cannot_be_is_refused() -> None:
    desk = running(nodes=3)
    vector = lanes(desk, 9)
    assert "bytes, not" in refusal(desk, "w0", changed(vector, lanes=vector.lanes[:-1]))
    assert "bytes, not" in refusal(desk, "w0", changed(vector, lanes=b""))
    assert refusal(desk, "w0", changed(vector, step=101)) == "step 101 of 100"
    assert refusal(desk, "w0", changed(vector, wall_s=float("nan"))) == "Vector.wall_s is nan"


def test_a_loss_that_is_no_number_is_news_and_no_nonsense() -> None:
    desk = running(nodes=3)
    vector = lanes(desk, 9)
    odd = np.frombuffer(vector.lanes, dtype="<f8").copy()
    odd[6] = np.nan
    desk.say("w0", changed(vector, lanes=odd.tobytes()))
    desk.tick()
    assert desk.state.step == 9 and desk.state.rejected.num_refused == 0
    assert desk.events("step_committed")[-1]["loss"] is None


def aligning() -> tuple[Desk, int]:
    """Node 2 is lost, and everybody is asked where it stands; nobody has answered ALIGN yet."""
    desk = running(nodes=3, partial_checkpoints=True)
    desk.deaf = {"Align"}
    desk.lose("w2")
    assert desk.state.phase is Phase.ALIGNING
    return desk, desk.state.generation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"history": b"x" * 8}, "a load history of 8 bytes, not 72"),
        ({"history": np.full(9, np.nan).tobytes()}, "a load history with numbers that count"),
        ({"num_experts": 0}, "1 layers of 0 experts"),
        ({"num_experts": 1 << 40}, "1 layers of 1099511627776 experts"),
        ({"num_layers": 2, "history": b"\0" * 144}, "2 layers of 3 experts, not (1, 3)"),
        ({"top_k": 4}, "top 4 of 3 experts"),
        ({"held": (Held(layer=0, experts=(3,)),)}, "L0/E3 of 1 layers of 3 experts"),
        ({"held": (Held(layer=0, experts=(1, 1)),)}, "an expert held twice"),
        ({"scalars": "{"}, "scalars is no JSON"),
        ({"scalars": "[" * 100_000}, "scalars is no JSON: RecursionError"),
        ({"scalars": '{"data": 3}'}, "scalars.data is no JSON object"),
        ({"scalars": '{"data": {"num_samples": 0.5}}'}, "scalars.data.num_samples is no count"),
        (
            {"snapshots": (SnapshotHeld(layer=0, expert=0, generation=1, step=-1),)},
            "a snapshot with a number below 0",
        ),
    ],
)
def test_an_aligned_rank_of_a_wrong_shape_is_refused(
    change: dict[str, object], reason: str
) -> None:
    desk, generation = aligning()
    body: Aligned = desk.aligned("w0", generation)
    assert refusal(desk, "w0", changed(body, **change)).startswith(reason)
    assert not desk.state.transition.aligned  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Paused(generation=1, step=101), "step 101 of 100"),
        (FaultFired(generation=1, step=1, kind="flood"), "no such fault: 'flood'"),
        (FaultFired(generation=1, step=1, kind="join", count=10**12), "a fault that brings"),
        (ShareReported(generation=1, step=1, record="nonsense"), "record is no JSON"),
        (ShareReported(generation=1, step=1, record="{}"), "record without kind or outcome"),
        (ReplicaMismatch(generation=1, step=1, what='{"event": "x"}'), "what names no expert"),
        (
            ReplicaMismatch(generation=1, step=1, what='{"a":' * 20 + "1" + "}" * 20),
            "what is nested deeper",
        ),
        (Evaluated(generation=1, step=1, count=float("inf")), "Evaluated.count is inf"),
        (Fence(generation=1), "no worker says this"),
    ],
)
def test_news_that_cannot_be_is_refused(body: Body, reason: str) -> None:
    assert refusal(running(nodes=3), "w0", body).startswith(reason)


def test_a_report_beyond_the_last_step_is_refused() -> None:
    desk = running(nodes=3, partial_checkpoints=True)
    desk.deaf = {"Fence"}
    desk.lose("w2")
    body = Report(generation=desk.state.generation, committed=10**9, prepared=10**9)
    assert refusal(desk, "w0", body) == "step 1000000000 of 100"
    assert desk.state.phase is Phase.FENCING and not desk.state.waiting.broken


def test_every_fault_that_can_be_asked_for_is_known() -> None:
    assert set(KINDS) == checks.FAULT_KINDS


def test_many_refusals_are_counted_and_the_first_are_on_record() -> None:
    desk = running(nodes=3)
    for _ in range(500):
        desk.feed(Garbled(worker="w1", reason="no FromWorker", at_s=desk.now_s))
    assert desk.state.rejected.num_refused == 500
    assert len(desk.events("message_refused")) == 20
    desk.lose("w0", "w1", "w2")
    desk.feed(DriverSaid(body=StopRun(now=True), at_s=desk.now_s))
    (end,) = desk.events("run_finished")
    assert end["refused_messages"] == 500 and end["stale_messages"] >= 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Fence(generation=1), "no driver says this"),
        (Paused(generation=1, step=8), "no driver says this"),
        (Injected(kind="flood", node_key="n1"), "no such fault: 'flood'"),
        (Injected(kind="kill", node_key="n" * 20_000), "Injected.node_key is a text of 20000"),
        (NodeNotice(node_key="n1", notice_s=-1.0), "NodeNotice.notice_s is -1.0"),
    ],
)
def test_what_no_driver_says_is_refused(body: Body, reason: str) -> None:
    desk = running(nodes=3)
    said = len(desk.log)
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    (event,) = desk.log[said:]
    assert isinstance(event, Publish) and event.event == "message_refused"
    assert event.fields["worker"] == "driver"
    assert str(event.fields["reason"]).startswith(reason)
    assert desk.state.rejected.num_refused == 1


@pytest.mark.parametrize(
    "body",
    [
        Paused(generation=1, step=0),
        Paused(generation=1, step=100),
        Heartbeat(generation=1, step=8, progress=checks.MOST),
        FaultFired(generation=1, step=1, kind="join", count=0),
        FaultFired(generation=1, step=1, kind="join", count=1024),
        Suspicion(generation=1, step=8, bad_source="s" * (1 << 16)),
        ReplicaMismatch(generation=1, step=1, what='{"layer": 0, "expert": 0, "majority": true}'),
        ShareReported(generation=1, step=8, record='{"kind": "persist", "ok": true}'),
    ],
)
def test_the_least_and_the_most_that_can_be_are_taken(body: Body) -> None:
    desk = running(nodes=3)
    desk.say("w0", body)
    assert desk.state.rejected.num_refused == 0


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 0},
        {"top_k": 3},
        {"held": (Held(layer=0, experts=(0, 2)),)},
        {"scalars": '{"data": {"num_samples": -1}}'},
        {"history": np.full(9, float(checks.MOST)).tobytes()},
    ],
)
def test_the_least_and_the_most_of_an_aligned_rank_are_taken(change: dict[str, object]) -> None:
    desk, generation = aligning()
    desk.say("w0", changed(desk.aligned("w0", generation), **change))
    assert desk.state.rejected.num_refused == 0
    assert list(desk.state.transition.aligned) == ["w0"]  # type: ignore[union-attr]


def test_a_worker_that_says_hello_again_keeps_its_place() -> None:
    desk = running(nodes=3)
    desk.say("w1", desk.hello("w1"))
    assert desk.state.rejected.num_refused == 0 and sorted(desk.state.roster.nodes) == [0, 1, 2]

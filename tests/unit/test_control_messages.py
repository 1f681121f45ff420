"""Messages just within their bounds and just beyond: what is refused, and with which reason."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from control_desk import (
    REPLICATED,
    Desk,
    refused,
    running,
)
from msgspec import NODEFAULT, Struct, structs
from msgspec.structs import replace as changed

from lazarus.control import messages
from lazarus.control.cluster.state import Phase
from lazarus.control.commit.exactly_once import ids_of_step, num_samples_in
from lazarus.control.commit.measures import measures_of, with_measures
from lazarus.control.membership import checks
from lazarus.control.membership.json_text import parsed
from lazarus.control.messages import (
    Aligned,
    DigestItem,
    DigestPart,
    Evaluated,
    Finalized,
    Heartbeat,
    Hello,
    Paused,
    Ready,
    ReplicaMismatch,
    Report,
    ShareReported,
    SnapshotHeld,
    StopRun,
    Suspicion,
    Tail,
)
from lazarus.control.ports import DriverSaid
from lazarus.control.vector import VectorLayout
from lazarus.errors import BrokenInvariantError
from lazarus.failure import Cause


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"version": "0.0.1"}, "worker runs version 0.0.1, the controller"),
        ({"ranks_per_node": 2}, "node n9 has 2 ranks, the run 1 a node"),
        ({"generation": 1}, "worker w9 is not a member of generation 1"),
        ({"worker": "w1", "node_key": "n1", "local_rank": 1}, "local rank 1 of 1"),
        ({"committed": -1}, "a number below 0: -1"),
        ({"term": -1, "fence": -1}, "a number below 0: -1"),
    ],
)
def test_a_hello_is_sent_away_with_the_reason(hello: dict[str, Any], reason: str) -> None:
    desk = running()
    desk.deaf = {"Fenced"}
    fields = {"worker": "w9", "node_key": "n9"} | hello
    desk.say(fields["worker"], Hello(**fields))
    assert desk.log[-2].body.reason.startswith(reason)  # type: ignore[union-attr]
    assert refused(desk) == 1 and len(desk.state.roster.nodes) == 3


def test_nobody_joins_a_run_that_ends() -> None:
    desk = running(**REPLICATED)
    desk.deaf = {"Fenced"}
    desk.feed(DriverSaid(body=StopRun(reason="enough"), at_s=desk.now_s))
    desk.say("w9", Hello(worker="w9", node_key="n9"))
    assert desk.log[-2].body.reason == "the run is ending"  # type: ignore[union-attr]
    desk.say("w1", Hello(worker="w1", node_key="n1", generation=1, fence=1))
    assert refused(desk) == 1  # whoever takes part may come back


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], ""),
        ([{"path": "a"}], ""),
        ([{}], "files that have no path"),
        ([{"path": 3}], "files that have no path"),
        ([3], "files that have no path"),
        ([{"path": "a"}, "b"], "files that have no path"),
        ({"path": "a"}, "files that have no path"),
    ],
)
def test_files_of_a_share_have_paths(files: Any, reason: str) -> None:
    record = json.dumps({"kind": "persist", "ok": True, "files": files})
    desk = running()
    body = ShareReported(generation=1, step=8, record=record)
    assert checks.wrong_with(desk.state, "w0", body) == reason


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (None, ""),
        ({"copy_rate": 1.0, "write_rate": 1, "window_s": 0.0}, ""),
        ({"copy_rate": 1.0, "write_rate": 1.0}, "measured is not ["),
        ({"copy_rate": 1.0, "write_rate": 1.0, "window_s": 0.0, "x": 1}, "measured is not ["),
        ([1.0, 1.0, 0.0], "measured is not ["),
        ({"copy_rate": 0.0, "write_rate": 1.0, "window_s": 0.0}, "measured holds what is no rate"),
        ({"copy_rate": 1.0, "write_rate": 0, "window_s": 0.0}, "measured holds what is no rate"),
        ({"copy_rate": 1.0, "write_rate": 1.0, "window_s": -0.1}, "measured holds what is no"),
        ({"copy_rate": 1.0, "write_rate": 1e300, "window_s": 0.0}, "measured holds what is no"),
        ({"copy_rate": "1", "write_rate": 1.0, "window_s": 0.0}, "measured holds what is no rate"),
    ],
)
def test_measured_rates_are_rates(measured: Any, reason: str) -> None:
    record = json.dumps({"kind": "persist", "ok": True, "measured": measured})
    body = ShareReported(generation=1, step=8, record=record)
    found = checks.wrong_with(running().state, "w0", body)
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("record", "taken"),
    [
        ({"kind": "copy", "ok": True}, True),
        ({"kind": 3, "ok": True}, False),
        ({"kind": "copy", "ok": 1}, False),
        ({"ok": True}, False),
    ],
)
def test_a_share_says_of_what_kind_it_is_and_whether_it_stands(
    record: dict[str, Any], taken: bool
) -> None:
    body = ShareReported(generation=1, step=8, record=json.dumps(record))
    assert (checks.wrong_with(running().state, "w0", body) == "") == taken


@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ({"layer": 0, "expert": 1}, True),
        ({"layer": 0}, False),
        ({"layer": 0, "expert": "1"}, False),
        ({"layer": 0, "expert": 1, "event": "x"}, False),
        ({"layer": 0, "expert": 1, "generation": 1}, False),
    ],
)
def test_a_difference_names_its_expert_and_no_field_of_the_record(
    what: dict[str, Any], taken: bool
) -> None:
    body = ReplicaMismatch(generation=1, step=8, what=json.dumps(what))
    assert (checks.wrong_with(running().state, "w0", body) == "") == taken


def test_what_belongs_to_another_attempt_is_not_looked_at() -> None:
    desk = running()
    for body in (
        Paused(generation=0, step=999),
        Evaluated(generation=0, step=999),
        DigestPart(generation=0, step=999, items=()),
        Report(generation=9, committed=999, prepared=999),
        Aligned(generation=9, step=0, num_layers=0),
        Ready(generation=9, plan_digest=""),
        Finalized(generation=1, step=999, files="[]"),
    ):
        assert checks.wrong_with(desk.state, "w0", body) == ""
    for body in (Paused(generation=1, step=-1), Evaluated(generation=1, step=101)):
        assert "of 100" in checks.wrong_with(desk.state, "w0", body)


def test_counts_of_messages_have_a_least_and_a_most() -> None:
    state = running().state
    beat = Heartbeat(generation=1, step=8)
    for name, value, taken in (
        ("progress", -1, True), ("progress", -2, False), ("acked", checks.MOST, True),
        ("acked", checks.MOST + 1, False), ("step", -2, False),
    ):  # fmt: skip
        found = checks.wrong_with(state, "w0", changed(beat, **{name: value}))
        assert (found == "") == taken, (name, value)
        assert taken or found == f"Heartbeat.{name} is {value}"
    long = Suspicion(generation=1, step=8, bad_source="s" * ((1 << 16) + 1))
    assert checks.wrong_with(state, "w0", long) == "a source of 65537 characters"
    inside = Report(generation=1, committed=8, prepared=8, tail=Tail(step=-7))
    assert checks.wrong_with(state, "w0", inside) == "Tail.step is -7"
    many = DigestPart(generation=1, step=8, items=(DigestItem(name="a", sha256=b""),))
    assert checks.wrong_with(state, "w0", many) == ""


def preparing() -> tuple[Desk, Ready]:
    desk = running(**REPLICATED)
    desk.deaf = {"Prepare"}
    desk.lose("w2")
    assert desk.state.phase is Phase.PREPARING and desk.state.transition is not None
    plan = desk.state.transition.plan
    assert plan is not None
    return desk, Ready(generation=desk.state.generation, plan_digest=plan.digest)


def test_who_was_not_asked_to_prepare_is_not_heard() -> None:
    desk, ready = preparing()
    assert checks.wrong_with(desk.state, "w0", ready) == ""
    assert checks.wrong_with(desk.state, "w9", ready) == "it was not asked"
    short = changed(ready, history=b"x" * 8)
    assert checks.wrong_with(desk.state, "w0", short).startswith("a load history of 8 bytes")
    odd = changed(ready, restored=(SnapshotHeld(layer=0, expert=3, generation=1, step=1),))
    assert checks.wrong_with(desk.state, "w0", odd) == "L0/E3 of 1 layers of 3 experts"
    assert desk.state.transition is not None
    back = replace(desk.state, transition=replace(desk.state.transition, rollback=True))
    assert checks.wrong_with(back, "w0", ready).startswith("no load history, though all state")
    desk.say("w0", changed(ready, plan_digest="another"))
    assert desk.state.phase is Phase.HOLDING and desk.state.waiting.broken
    assert desk.events("quorum_lost")[0]["reason"] == "plan digest differs on w0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 0}, "0 layers of 3 experts"),
        ({"num_experts": 0}, "1 layers of 0 experts"),
        ({"top_k": -1}, "top -1 of 3 experts"),
        ({"dense_bytes": -1}, "a size below 0"),
        ({"expert_bytes": -1}, "a size below 0"),
        ({"scalars": '{"data": {"num_samples": -2}}'}, "scalars.data.num_samples is no count"),
        ({"scalars": '{"data": {"num_samples": true}}'}, "scalars.data.num_samples is no count"),
        ({"scalars": '{"data": null}'}, ""),
        ({"scalars": "[]"}, "scalars is no JSON object"),
        ({"history": np.full(9, -1.0).tobytes()}, "a load history with numbers that count"),
    ],
)
def test_an_aligned_rank_at_its_bounds(change: dict[str, Any], reason: str) -> None:
    desk = running(**REPLICATED)
    desk.deaf = {"Align"}
    desk.lose("w2")
    body = changed(desk.aligned("w0", desk.state.generation), **change)
    found = checks.wrong_with(desk.state, "w0", body)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_text_is_nested_up_to_a_depth_and_an_object() -> None:
    def nested(depth: int, *, by: str) -> str:
        opened, closed = ('{"a":', "}") if by == "map" else ("[", "]")
        return '{"a":' + opened * (depth - 1) + "1" + closed * (depth - 1) + "}"

    for by in ("map", "list"):
        assert parsed(nested(16, by=by), what="it")[1] == ""
        assert parsed(nested(17, by=by), what="it") == ({}, "it is nested deeper than 16")
    assert parsed("", what="it") == ({}, "") == parsed("{}", what="it")
    assert parsed("[1]", what="it") == ({}, "it is no JSON object")
    assert parsed('{"a": [{}, [], 1]}', what="it") == ({"a": [{}, [], 1]}, "")


def test_metrics_come_back_as_they_were_summed() -> None:
    layout = VectorLayout(world_size=2, num_layers=1, num_experts=3)
    fixed = np.zeros(layout.num_lanes)
    assert with_measures(fixed, (), np.zeros(0)) is fixed and measures_of(layout, fixed) == {}
    lanes = with_measures(fixed, ("a", "bb", "none"), np.array([6.0, 2.0, 5.0, 1.0, 0.0, 0.0]))
    assert measures_of(layout, lanes) == {"a": (3.0, 2.0), "bb": (5.0, 1.0)}
    cut = np.concatenate([fixed, [5.0], np.zeros(4)])
    with pytest.raises(BrokenInvariantError, match="names 1 measures and sums 5"):
        measures_of(layout, cut)


def test_sample_ids_follow_the_size_of_the_data() -> None:
    for text, size in (
        ("", 0),
        ("{}", 0),
        ('{"data": null}', 0),
        ('{"data":{"num_samples":9}}', 9),
    ):
        assert num_samples_in(text) == size
    kinds = [ids_of_step(3, seed=0, global_batch=4, num_samples=n).tolist() for n in (-1, 0, 1, 50)]
    assert kinds[0] == kinds[1] != kinds[3] and kinds[2] == [0] * 4


def test_what_a_sender_leaves_out_is_not_known_or_none() -> None:
    """A reader of another version fills in these values: they are part of the encoding."""
    left_out = {}
    for name, kind in vars(messages).items():
        if isinstance(kind, type) and issubclass(kind, Struct):
            for field in structs.fields(kind):
                if field.default is not NODEFAULT and field.default:
                    left_out[f"{name}.{field.name}"] = field.default
    assert left_out == {
        **dict.fromkeys(("Tail.last", "Tail.rank", "Tail.step"), -1),
        **dict.fromkeys(("UserError.rank", "WorkerDied.rank"), -1),
        **dict.fromkeys(("Repaired.layer", "Repaired.expert"), -1),
        **dict.fromkeys(("Hello.host", "Seat.host"), "127.0.0.1"),
        **dict.fromkeys(("Prepare.lineage", "Resume.lineage"), "[]"),
        **dict.fromkeys(("Hello.ranks_per_node", "FaultFired.count"), 1),
        "UserError.cause": Cause.USER_CODE,
        "Finalize.checkpoint": True,
        "Report.tail": Tail(),
    }


def test_vectors_in_a_report_are_looked_at_like_any_other() -> None:
    desk = running(**REPLICATED)
    good = desk.vector(9)
    desk.deaf = {"Fence"}
    desk.lose("w2")
    report = Report(generation=2, committed=8, prepared=9, vectors=(good,))
    assert checks.wrong_with(desk.state, "w0", report) == ""
    short = changed(report, vectors=(good, changed(good, lanes=good.lanes[:-8])))
    assert "bytes, not" in checks.wrong_with(desk.state, "w0", short)
    old = changed(report, vectors=(changed(good, generation=0, lanes=b""),))
    assert checks.wrong_with(desk.state, "w0", old) == ""  # it is dropped later

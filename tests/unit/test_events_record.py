"""The record: what is written reads back, damage is named, figures follow from it alone."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from lazarus.errors import RecordError
from lazarus.record import metrics
from lazarus.record.events import FIELDS, SCHEMA, encode, faults_of, read_events


def make_event(event: str, *, t: float, generation: int, **fields: Any) -> dict[str, Any]:
    """An event of the record, checked as a reader checks it."""
    made = {"t": t, "event": event, "generation": generation, **fields}
    if event == "run_started":
        made.setdefault("schema", SCHEMA)
    assert event in FIELDS and faults_of(made) == []
    return made


def commit(step: int, t: float, *, generation: int = 1, **more: Any) -> dict[str, Any]:
    fields = {"loss": 3.0, "tokens": 100, "num_nodes": 4, "wall_s": 0.5} | more
    return make_event("step_committed", t=t, generation=generation, step=step, **fields)


def a_run_with_a_kill() -> list[dict[str, Any]]:
    """Start at 100, a step each 0.5 s, node 2 killed in step 4, back after 0.4 s."""
    lost = [
        make_event("fault_injected", t=101.6, generation=1, node=2, kind="kill", step=4),
        make_event("node_lost", t=101.65, generation=1, node=2, cause="stream closed"),
    ]
    rebuilt = make_event(
        "reconfigured",
        t=102.0,
        generation=2,
        reason="loss",
        wall_s=0.35,
        phases={"plan": 0.01, "groups": 0.1, "redo": 0.2},
        num_nodes=3,
        moves=4,
        bytes_moved=1000,
        lost=[2],
        step=3,
    )
    return [
        make_event("run_started", t=100.0, generation=1, num_nodes=4, world_size=4),
        *(commit(s, 100 + 0.5 * s) for s in (1, 2, 3)),
        *lost,
        rebuilt,
        *(commit(s, 100 + 0.5 * s, generation=2, num_nodes=3) for s in (4, 5, 6)),
        make_event("state_digest", t=103.0, generation=2, step=6, digest="ab"),
    ]


def test_a_record_reads_back_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    events = a_run_with_a_kill()
    path = tmp_path / "events.jsonl"
    path.write_text("".join(map(encode, events)) + '{"t": 1.0, "event": "step_comm')
    assert read_events(tmp_path) == events
    assert read_events(path) == events


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("garbage", "Expecting value"),
        ("[1]", "not a JSON object"),
        ('{"event": "x", "generation": 1}', "t = None must be int"),
        ('{"t": 1.0, "event": 5, "generation": 1}', "event = 5 must be str"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(encode(a_run_with_a_kill()[0]) + line + "\n")
    with pytest.raises(RecordError, match=f":2: .*{said}"):
        read_events(path)


def test_a_missing_record_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        read_events(tmp_path)


def test_a_loss_that_is_no_number_is_null_in_the_file() -> None:
    assert '"loss": null' in encode(commit(1, 1.0, loss=math.nan))
    assert faults_of(commit(1, 1.0) | {"loss": None}) == []


def test_unknown_events_and_fields_are_fine_but_known_ones_are_checked() -> None:
    assert faults_of({"t": 1, "event": "of_tomorrow", "generation": 1}) == []
    assert faults_of(commit(1, 1.0) | {"new": 1}) == []
    lossless = {name: value for name, value in commit(1, 1.0).items() if name != "loss"}
    assert faults_of(lossless) == ["field loss is missing"]
    assert "run_finished" in FIELDS


def test_goodput_and_ettr_count_each_committed_step_once() -> None:
    events = a_run_with_a_kill()
    assert metrics.wall_s(events) == 3.0
    assert metrics.goodput(events) == pytest.approx(600 / 3.0)
    assert metrics.ettr(events) == pytest.approx(6 * 0.5 / 3.0)
    assert metrics.steps_lost(events) == 0


def test_a_recovery_is_told_from_its_events() -> None:
    (recovery,) = metrics.recoveries(a_run_with_a_kill())
    assert (recovery.node, recovery.step, recovery.steps_lost) == (2, 4, 0)
    assert recovery.detect_s == pytest.approx(0.05)
    assert recovery.back_s == pytest.approx(0.4)
    assert (recovery.rebuild_s, recovery.bytes_moved, recovery.num_nodes) == (0.35, 1000, 3)


def test_the_order_of_lines_in_the_file_does_not_change_a_recovery() -> None:
    events = a_run_with_a_kill()
    late_commits = sorted(events, key=lambda e: e["event"] == "step_committed")
    assert metrics.recoveries(late_commits) == metrics.recoveries(events)


def test_a_rollback_voids_the_steps_after_it() -> None:
    events = [
        make_event("run_started", t=0.0, generation=1, num_nodes=2, world_size=2),
        *(commit(s, float(s)) for s in (1, 2, 3, 4)),
        *(commit(s, 5.0 + s, generation=2) for s in (2, 3)),
    ]
    assert metrics.steps_lost(events) == 3
    assert sorted(metrics.committed_steps(events)) == [1, 2, 3]
    assert metrics.committed_tokens(events) == 300


def as_defined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """``committed_steps``, a commit at a time over all that counted so far."""
    counted: dict[int, dict[str, Any]] = {}
    for event in events:
        counted = {s: e for s, e in counted.items() if s < event["step"]}
        counted[event["step"]] = event
    return counted


def test_committed_steps_are_those_of_the_definition_whatever_is_rolled_back() -> None:
    rng = random.Random(0)
    for _ in range(200):
        step, events = 0, []
        for number in range(rng.randrange(40)):
            step = max(1, step + 1 - (rng.randrange(6) if rng.random() < 0.3 else 0))
            events.append(commit(step, float(number)))
        assert metrics.committed_steps(events) == as_defined(events)


def test_the_summary_of_a_long_run_counts_each_step_once() -> None:
    steps = [*range(1, 15_001), *range(14_001, 19_001)]
    events = [commit(step, 0.5 * number) for number, step in enumerate(steps)]
    found = metrics.summarise(events)
    assert (found.steps, found.steps_lost, found.tokens) == (19_000, 1_000, 1_900_000)


def test_time_between_two_lives_is_not_wall_time() -> None:
    start = make_event("run_started", t=0.0, generation=1, num_nodes=2, world_size=2)
    events = [start, commit(1, 1.0), start | {"t": 1000.0}, commit(2, 1002.0)]
    assert metrics.wall_s(events) == 3.0


def test_plt_is_the_mean_over_layers_of_lost_over_routed_copies() -> None:
    restored = {"expert": 0, "source": "host", "behind_steps": 1}
    events = [
        make_event(
            "run_started", t=0, generation=1, num_nodes=2, world_size=2, num_layers=2, top_k=2
        ),
        *(commit(s, float(s)) for s in range(1, 11)),
        make_event("expert_restored", t=5, generation=1, layer=0, lost_copies=30, **restored),
        make_event("expert_restored", t=5, generation=1, layer=1, lost_copies=10, **restored),
    ]
    assert metrics.plt(events) == pytest.approx((30 / 2000 + 10 / 2000) / 2)
    assert metrics.plt(events[:3]) == 0.0


def test_an_empty_record_has_a_summary_too() -> None:
    summary = metrics.summarise([])
    assert (summary.steps, summary.goodput_tokens_per_s, summary.recoveries) == (0, 0.0, ())

"""The record as its one writer has it: nothing of it in memory, and the same totals."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lazarus.record import metrics
from lazarus.record.events import read_events
from lazarus.runtime.controller.record_log import Mark, RecordLog

Event = dict[str, Any]


def a_run(seed: int, *, lives: int = 3) -> list[Event]:
    """A record with lives, rollbacks, steps done again and experts restored, at random."""
    rng, found, step, m = Random(seed), [], 0, 0.0
    for life in range(lives):
        m += rng.uniform(0.0, 5.0)
        started = {"num_nodes": 3, "world_size": 3, "schema": 1, "top_k": 2, "num_layers": 2}
        found.append({"event": "run_started", **started, "m": m})
        step = max(0, step - rng.randrange(3)) if life else 0
        for _ in range(rng.randrange(60)):
            m += rng.uniform(0.1, 1.0)
            if rng.random() < 0.1:
                step = max(0, step - rng.randrange(1, 20))
                restored = {"layer": 0, "expert": 1, "source": "s", "behind_steps": 1}
                found.append(
                    {"event": "expert_restored", **restored, "lost_copies": rng.random(), "m": m}
                )
            step += 1
            commit = {"loss": 2.0, "tokens": rng.randrange(1, 99), "num_nodes": 3, "wall_s": 0.25}
            found.append({"event": "step_committed", "step": step, **commit, "m": m})
    end = {"steps": step, "wall_s": m, "status": "finished", "cause": ""}
    return [
        {"t": 1e9, "generation": 1, **event}
        for event in [*found, {"event": "run_finished", **end, "m": m}]
    ]


@pytest.mark.parametrize("seed", range(40))
def test_the_totals_are_those_of_the_whole_record_wherever_a_life_begins(
    tmp_path: Path, seed: int
) -> None:
    events, rng = a_run(seed), Random(seed)
    path, mark = tmp_path / "events.jsonl", None
    log = RecordLog(path)
    for number, event in enumerate(events, start=1):
        log.append(log.completed(event))
        wanted = metrics.summarise(events[:number])
        figures = log.totals.figures()
        assert log.totals.tokens == wanted.tokens
        assert log.totals.wall_s == pytest.approx(wanted.wall_s)
        assert figures["ettr"] == pytest.approx(wanted.ettr)
        assert figures["plt"] == pytest.approx(wanted.plt)
        assert figures["goodput_tokens_per_s"] == pytest.approx(wanted.goodput_tokens_per_s)
        if rng.random() < 0.1:
            mark = Mark.from_dict(json.loads(json.dumps(log.mark().to_dict())))
        if rng.random() < 0.1:  # the controller dies; its next life reads from the mark on
            log.close()
            with path.open("ab") as out:
                out.write(b'{"t": 1.0, "eve')
            log = RecordLog(path, since=mark)
    log.close()
    written = read_events(path)
    assert len(written) == len(events)
    assert written[-1]["ettr"] == pytest.approx(metrics.ettr(events))


def test_a_later_controller_knows_what_was_said_since_the_mark(tmp_path: Path) -> None:
    events = a_run(1, lives=1)
    log = RecordLog(tmp_path / "events.jsonl")
    for event in events[:5]:
        log.append(log.completed(event))
    mark = log.mark()
    for event in events[5:-1]:
        log.append(log.completed(event))
    later = RecordLog(tmp_path / "events.jsonl", since=mark, goes_on=True)
    commits = [e for e in events[5:-1] if e["event"] == "step_committed"]
    assert all(later.said("step_committed", 1, e["step"]) for e in commits)
    assert not later.said("step_committed", 2, commits[0]["step"])
    assert later.last_m == events[-2]["m"] and later.last_event == events[-2]["event"]


@pytest.mark.parametrize("num_bytes", [10**9, 3])
def test_a_mark_that_does_not_fit_the_record_is_not_believed(
    tmp_path: Path, num_bytes: int
) -> None:
    """A crash of the machine may have cut the record, or somebody has edited it."""
    log = RecordLog(tmp_path / "events.jsonl")
    events = a_run(3)
    for event in events:
        log.append(log.completed(event))
    odd = Mark(num_bytes=num_bytes, totals=log.totals)
    again = RecordLog(tmp_path / "events.jsonl", since=odd)
    assert again.totals == log.totals and again.totals.tokens == metrics.committed_tokens(events)


@pytest.mark.parametrize("knows", ["nothing", "a mark"])
def test_a_damaged_line_is_named_and_blanked_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], knows: str
) -> None:
    """D10: a controller that starts again finds a line that is none; every reader reads again."""
    path = tmp_path / "events.jsonl"
    log = RecordLog(path)
    for event in a_run(4)[:5]:
        log.append(log.completed(event))
    mark, before = log.mark(), read_events(path)
    line = b'{"t": 1.0, "\xff\x00": }'
    with path.open("ab") as out:
        out.write(line + b"\n")
    more = RecordLog(path, since=mark if knows == "a mark" else None)
    said = capsys.readouterr().err
    assert f"{path}: the line at byte {mark.num_bytes:,} was damaged" in said
    more.append(more.completed(before[-1]))
    assert read_events(path) == [*before, before[-1]]
    (kept,) = (tmp_path / "events.damaged").read_text().splitlines()
    assert base64.b64decode(json.loads(kept)["bytes"]) == line

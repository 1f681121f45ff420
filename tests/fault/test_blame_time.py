"""Clocks that are set while a run is under way: only times of day follow them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SMALL
from set_clocks import SetClocks

from lazarus.record.events import moment, read_events
from lazarus.record.journal_reader import read_journal
from lazarus.record.metrics import summarise

STALL_S = 5.0
Event = dict[str, Any]


class Job:
    """``lazarus train`` as a process of its own, and its record as it grows."""

    def __init__(self, folder: Path, *options: str, settings: tuple[str, ...] = ()) -> None:
        self.clocks = SetClocks(folder / "clocks")
        self.folder = folder / "run"
        given = (*SMALL, "metrics.report=false", f"recovery.tolerated_stall_s={STALL_S}", *settings)
        sets = [part for text in given for part in ("--set", text)]
        command = [sys.executable, "-m", "lazarus", "train", "--run-dir", str(self.folder)]
        self._output = (folder / "output").open("wb")
        self._process = subprocess.Popen(
            [*command, *options, *sets],
            env=self.clocks.environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def follow(self) -> Iterator[Event]:
        """Every line of the record as it is written, until the command is over."""
        record, read = self.folder / "events.jsonl", 0
        pause = threading.Event()
        while True:
            over = self._process.poll() is not None
            text = record.read_text() if record.exists() else ""
            whole = text[read : text.rfind("\n") + 1]
            read += len(whole)
            yield from (json.loads(line) for line in whole.splitlines())
            if over:
                return
            pause.wait(0.05)

    def close(self) -> int:
        """Wait for the end. Returns the exit status."""
        try:
            return self._process.wait(120)
        finally:
            self._process.kill()
            self._process.wait()
            self._output.close()

    def pids(self) -> set[int]:
        """The command itself, and each process that it made which notes its number."""
        terms = [e["pid"] for e in read_journal(self.folder / "journal") if e["kind"] == "term"]
        return {self._process.pid, *terms}


def train(
    folder: Path, *options: str, set_at: dict[int, float], act: Callable[[Job, Event], None]
) -> tuple[Job, list[Event], int]:
    """Run to the end; at a committed step the clocks of all processes are set."""
    job = Job(folder, *options)
    waiting = dict(set_at)
    try:
        for event in job.follow():
            act(job, event)
            if event["event"] == "step_committed" and waiting and event["step"] >= min(waiting):
                job.clocks.set(waiting.pop(min(waiting)))
    finally:
        status = job.close()
    assert not waiting, (folder / "output").read_text()
    assert job.clocks.reached() >= job.pids(), "a process had a clock of its own"
    return job, read_events(job.folder), status


def jumps(events: list[Event]) -> list[float]:
    """By how much the times of day left the run's own clock, from line to line, in seconds."""
    ahead = [event["t"] - event["m"] for event in events]
    moved = [b - a for a, b in pairwise(ahead)]
    return [round(by, 1) for by in moved if abs(by) > 1.0]


def committed(events: list[Event]) -> list[int]:
    return [event["step"] for event in events if event["event"] == "step_committed"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_clocks_that_jump_lose_no_node_and_no_line_of_the_record(tmp_path: Path) -> None:
    """B1, B3: +15 s, -1 h and +1 day in all processes; nothing happens, and the record goes on."""
    steps, by = 200, {20: 15.0, 60: -3600.0, 100: 86_400.0, 140: 0.0}
    _, events, status = train(
        tmp_path, "--nodes", "3", "--steps", str(steps), set_at=by, act=lambda job, event: None
    )
    assert status == 0, (tmp_path / "output").read_text()
    assert jumps(events) == [15.0, -3615.0, 90_000.0, -86_400.0]
    assert committed(events) == list(range(1, steps + 1))
    assert not [e for e in events if e["event"] in ("node_lost", "quorum_lost")]
    summary = summarise(events)
    assert 0.0 < summary.wall_s < 240.0 and 0.0 < summary.ettr <= 1.0
    assert 0.0 < events[-1]["wall_s"] < 240.0 and 0.0 < events[-1]["ettr"] <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ahead_s", [-3600.0, 86_400.0])
def test_a_stopped_worker_is_evicted_after_the_stall_whatever_the_clock_says(
    tmp_path: Path, ahead_s: float
) -> None:
    """B2: the wall clock is stepped right after a worker was stopped."""

    def step_clock(job: Job, event: Event) -> None:
        if event["event"] == "fault_injected":
            job.clocks.set(ahead_s)

    fault = ("--nodes", "3", "--steps", "60", "--fault", "stop:1@20")
    _, events, status = train(tmp_path, *fault, set_at={}, act=step_clock)
    assert status == 0, (tmp_path / "output").read_text()
    assert jumps(events) == [ahead_s]
    (fired,) = (e for e in events if e["event"] == "fault_injected")
    (lost,) = (e for e in events if e["event"] == "node_lost")
    assert lost["node"] == fired["node"] == 1
    assert moment(lost) - moment(fired) <= STALL_S + 1.0
    assert committed(events) == list(range(1, 61))
    (recovery,) = summarise(events).recoveries
    assert recovery.back_s is not None and 0.0 < recovery.back_s < 60.0


def test_the_clock_of_the_test_is_believed_by_a_process(tmp_path: Path) -> None:
    clocks = SetClocks(tmp_path)
    clocks.set(-3600.0)
    assert abs(clocks.says() + 3600.0) < 30.0

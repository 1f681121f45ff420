"""A long record is condensed; every figure stays what it was, in memory that does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarus.record.condensed import condensed_events
from lazarus.record.events import encode, read_events
from lazarus.record.metrics import summarise
from lazarus.report.series import view_of


def record_of(rng: Random, *, steps: int) -> list[dict[str, Any]]:
    """A run with losses, redone steps, rollbacks and checkpoints, as a record has it."""
    at_s, generation, nodes, step = 100.0, 1, 4, 0
    found: list[dict[str, Any]] = []

    def say(name: str, **fields: Any) -> None:
        nonlocal at_s
        at_s += rng.random()
        found.append({"t": at_s, "m": at_s - 50, "event": name, "generation": generation} | fields)

    shape = {"schema": 1, "run": "r", "world_size": 4, "num_layers": 2, "top_k": 2}
    say("run_started", num_nodes=nodes, steps=steps, **shape)
    while step < steps:
        step += 1
        loss = None if rng.random() < 0.01 else rng.random()
        fields = {"tokens": rng.randrange(1, 99), "num_nodes": nodes, "wall_s": rng.random()}
        say("step_committed", step=step, loss=loss, **fields)
        if rng.random() < 0.05:
            say("checkpoint_persisted", step=step, bytes=5, wall_s=0.1)
        if rng.random() < 0.02:
            victim = rng.randrange(9)
            say("fault_injected", node=victim, kind="kill", step=step, phase="", spec="kill")
            say("node_lost", node=victim, cause="SIGKILL")
            generation += 1
            step = max(0, step - rng.choice((0, 0, 1, 7)))
            more = {"reason": "node_lost", "wall_s": 0.5, "phases": {"plan": 0.1}, "moves": 3}
            say("reconfigured", num_nodes=nodes, bytes_moved=7, step=step, lost=[victim], **more)
    figures = {"wall_s": at_s, "goodput_tokens_per_s": 1.0, "ettr": 0.5, "plt": 0.25}
    say("run_finished", status="finished", cause="", steps=step, state_digest="abc", **figures)
    return found


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    path = folder / "events.jsonl"
    path.write_text("".join(encode(event) for event in events), encoding="utf-8")
    return path


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 250), most=st.integers(4, 30))
def test_all_figures_of_a_condensed_record_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, most: int
) -> None:
    path = written(tmp_path_factory.mktemp("run"), record_of(Random(seed), steps=steps))
    whole, short = read_events(path), condensed_events(path, most=most)
    one, other = summarise(whole), summarise(short)
    for name in one.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        assert a == (pytest.approx(b) if isinstance(b, float) else b), name
    others = [e for e in whole if e["event"] != "step_committed"]
    assert others == [e for e in short if e["event"] != "step_committed"]
    assert [e["t"] for e in others] == sorted(e["t"] for e in others)
    assert view_of(short, name="r").marks == view_of(whole, name="r").marks


def test_a_record_that_is_not_long_is_not_touched(tmp_path: Path) -> None:
    path = written(tmp_path, record_of(Random(3), steps=200))
    assert condensed_events(path) == read_events(path)


def test_a_long_record_becomes_short(tmp_path: Path) -> None:
    events = record_of(Random(0), steps=3)[:1]
    line = {"event": "step_committed", "generation": 1, "loss": 1.0, "tokens": 2, "num_nodes": 4}
    events += [{"t": 200.0 + n, "step": n, "wall_s": 1.0, **line} for n in range(1, 5001)]
    path = written(tmp_path, events)
    short = condensed_events(path, most=100)
    assert len(short) <= 150
    assert summarise(short).tokens == 10_000 and summarise(short).steps == 5000


_AT_THE_END = """
import resource, sys
from pathlib import Path
from lazarus.run.result import leave_artifacts
leave_artifacts(Path(sys.argv[1]))  # of a small run: all imports
small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leave_artifacts(Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - small)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_end_of_a_run_of_a_million_steps_needs_no_memory_for_each(tmp_path: Path) -> None:
    """Its record has 200 MB; as dictionaries it would be more than a gigabyte."""
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, steps in zip(folders, (50, 1_000_000), strict=True):
        folder.mkdir()
        start, *_, end = record_of(Random(1), steps=3)
        row = json.dumps({**record_of(Random(1), steps=1)[1], "m": 1, "t": 1, "step": 1})
        row = row.replace('"t": 1,', '"t": %d,').replace('"m": 1,', '"m": %d,')
        row = row.replace('"step": 1,', '"step": %d,') + "\n"
        with (folder / "events.jsonl").open("w") as out:
            out.write(encode(start))
            out.writelines(row % (200 + n, 150 + n, n) for n in range(1, steps + 1))
            out.write(encode({**end, "t": 300 + steps, "m": 250 + steps, "steps": steps}))
    code = [sys.executable, "-c", _AT_THE_END, *map(str, folders)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, timeout=280)
    assert (folders[1] / "report.html").exists(), done.stderr
    assert int(done.stdout) < 150 << 10, f"{int(done.stdout) >> 10} MB"

"""Whole runs through the real command line: the demo, Ctrl-C, a user's exception, a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazarus.record.events import read_events

ROOT = Path(__file__).resolve().parents[2]
# Plain processes instead of Ray: the same code path above the launcher, and quick to start.
QUICK = "cluster.launcher=process"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "LAZARUS_SET": QUICK,
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "LAZARUS_TEST_MARK": folder.name,
    }


def processes_of(folder: Path) -> list[int]:
    """Every live process that inherited this test's mark."""
    mark = f"LAZARUS_TEST_MARK={folder.name}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:  # ended meanwhile, or not ours
            continue
    return found


def assert_nothing_left(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        os.sched_yield()
    assert left == []


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lazarus", *arguments],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: "subprocess.Popen[str]", record: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    wanted = f'"step":{step},'
    while time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()
        path = record / "events.jsonl"
        if path.exists() and wanted in path.read_text().replace(" ", ""):
            return
        os.sched_yield()
    raise AssertionError(f"step {step} did not come: {run.communicate()}")


def test_the_demo_tells_what_happened_and_loses_nothing(tmp_path: Path) -> None:
    run = start("demo", "--run-dir", "demo", cwd=tmp_path)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "! fault on purpose: kill of node 2 in step 30" in err
    assert "x node 2 lost" in err
    assert "detected after" in out
    assert "recovered (next committed step) after" in out
    assert "steps lost in all: 0" in out
    assert f"The record lies in {tmp_path / 'demo'}" in out
    events = read_events(tmp_path / "demo")
    steps = [e["step"] for e in events if e["event"] == "step_committed"]
    assert steps == list(range(1, 61))
    assert (tmp_path / "demo" / "config.toml").exists()
    moved = [e["bytes_moved"] for e in events if e["event"] == "reconfigured"]
    assert max(moved) > 0
    assert_nothing_left(tmp_path)


def test_ctrl_c_ends_at_the_next_commit_with_a_readable_record(tmp_path: Path) -> None:
    run = start("train", "--run-dir", "r", "--nodes", "3", "--steps", "5000", cwd=tmp_path)
    wait_for_step(run, tmp_path / "r", 3)
    before = time.monotonic()
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert time.monotonic() - before < 30
    assert "Traceback" not in err
    events = read_events(tmp_path / "r")
    assert events[-1]["event"] == "run_finished"
    assert_nothing_left(tmp_path)


def test_sigterm_ends_the_run_resumable_and_resume_goes_on(tmp_path: Path) -> None:
    arguments = ("train", "--run-dir", "r", "--nodes", "3", "--preset", "tiny")
    run = start(*arguments, "--steps", "5000", cwd=tmp_path)
    wait_for_step(run, tmp_path / "r", 3)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 3, err
    last = max(e["step"] for e in read_events(tmp_path / "r") if e["event"] == "step_committed")
    again = start("train", "--resume", "r", "--steps", str(last + 3), "--json", cwd=tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(out)["steps"] == last + 3
    steps = [e["step"] for e in read_events(tmp_path / "r") if e["event"] == "step_committed"]
    assert steps == list(range(1, last + 4))
    assert_nothing_left(tmp_path)


BROKEN_MODEL = """
from torch import nn
from lazarus import ElasticTrainer, TrainConfig
from lazarus.cli import main
import lazarus.run.trainer as trainer
import sys

class Broken(nn.Module):
    def forward(self, tokens):
        raise ValueError("my own mistake")

def build(ctx):
    from lazarus import MoELayer
    model = Broken()
    model.experts = MoELayer(dim=8, hidden=8, num_experts=8, top_k=1)
    return model

class Mine(ElasticTrainer):
    def __init__(self, config, **options):
        super().__init__(config, model=build, loss=lambda m, b: m(b["tokens"]), **options)

trainer.ElasticTrainer = Mine
sys.exit(main(["train", "--run-dir", "r", "--nodes", "2", "--steps", "5"]))
"""


def test_an_exception_in_the_users_model_ends_with_the_users_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_MODEL],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert 'raise ValueError("my own mistake")' in done.stderr or "my own mistake" in done.stderr
    assert "in forward" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert_nothing_left(tmp_path)


def test_the_own_model_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_model.py")],
        cwd=tmp_path,
        env=environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "30 steps, loss" in done.stdout
    assert len((ROOT / "examples" / "own_model.py").read_text().splitlines()) < 40
    assert_nothing_left(tmp_path)

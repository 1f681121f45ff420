"""What Ray's metrics page shows of a run while nothing happens in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lazarus.record.events import read_events

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STAYS = (
    "ray_lazarus_holding",
    "ray_lazarus_nodes",
    "ray_lazarus_step",
    "ray_lazarus_checkpoint_every",
    "ray_lazarus_tolerated_stall_seconds",
)
ONCE = """
import sys, ray
from ray.util.metrics import Gauge
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
Gauge("set_once").set(1.0)
sys.stdin.read()
"""


def page(head: Any) -> dict[str, str]:
    """Series on the metrics page -> value."""
    with urllib.request.urlopen(head.metrics_page, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def shown(head: Any) -> dict[str, dict[str, str]]:
    """Name of a gauge -> its series."""
    found: dict[str, dict[str, str]] = {}
    for series, value in page(head).items():
        name = series.partition("{")[0]
        if name in (*STAYS, "ray_set_once"):
            found.setdefault(name, {})[series] = value
    return found


def steps_of(record: Path) -> list[int]:
    path = record / "events.jsonl"
    found = read_events(record) if path.exists() else []
    return [e["step"] for e in found if e["event"] == "step_committed"]


def test_gauges_stay_while_nothing_happens_and_one_that_is_set_once_is_gone(
    ray_head: Any, quick: list[str], tmp_path: Path, poll: Any
) -> None:
    """R9: Ray drops a gauge that nobody sets again, just when an alert needs it."""
    record, err = tmp_path / "record", tmp_path / "err"
    settings = ("--set", "recovery.tolerated_stall_s=600", "--set", "checkpoint.every=1000")
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "lazarus", "train", "configs/tiny.toml", *quick, *settings),
            *("--nodes", "2", "--steps", "100000", "--address", ray_head.address),
            *("--run-dir", str(record)),
        ],
        cwd=ROOT,
        env=ray_head.environment | {"RAY_ADDRESS": ""},
        stdout=subprocess.DEVNULL,
        stderr=err.open("w"),
    )

    def trains() -> bool:
        assert run.poll() is None, err.read_text()
        return len(steps_of(record)) > 2

    assert poll(trains, timeout_s=240), err.read_text()
    (rank, *_) = (p for p, line in ray_head.books.alive().items() if "ray::WorkerActor" in line)
    os.kill(rank, signal.SIGSTOP)  # no event sets a gauge from now on
    other = subprocess.Popen(
        [sys.executable, "-c", ONCE, ray_head.address],
        env=ray_head.environment,
        stdin=subprocess.PIPE,
    )
    assert poll(lambda: "ray_set_once" in shown(ray_head), timeout_s=120)
    at = max(steps_of(record))
    assert poll(lambda: "ray_set_once" not in shown(ray_head), timeout_s=240)
    last = shown(ray_head)
    assert other.poll() is None and max(steps_of(record)) == at, "something happened meanwhile"
    assert set(last) == set(STAYS)
    name = next(e["run"] for e in read_events(record) if e["event"] == "run_started")
    assert all(f'run="{name}"' in series for found in last.values() for series in found)
    assert {float(value) for value in last[STAYS[4]].values()} == {600.0}
    assert {float(value) for value in last[STAYS[0]].values()} == {0.0}
    os.kill(rank, signal.SIGCONT)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130, err.read_text()
    other.communicate()
    assert other.returncode == 0

"""A run's status and events, from its record alone; and the machine's fitness."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lazarus import cli
from lazarus.commands.machine_checks import examine
from lazarus.record.events import encode
from lazarus.record.status import describe, status_of

START = {"t": 100.0, "event": "run_started", "generation": 1, "num_nodes": 3, "world_size": 3}
START |= {"steps": 40}
PLAN = {"t": 100.0, "event": "plan_adopted", "generation": 1, "digest": "ab"}
PLAN |= {"floor": 2, "requested_floor": 2}
LOST = {"t": 103.0, "event": "node_lost", "generation": 1, "node": 1, "cause": "stream closed"}
BACK = {"t": 103.4, "event": "reconfigured", "generation": 2, "reason": "node_lost"}
BACK |= {"wall_s": 0.4, "phases": {}, "num_nodes": 2, "moves": 0, "bytes_moved": 0, "step": 2}
HOLD = {"t": 104.0, "event": "quorum_lost", "generation": 3, "reason": "1 of 2 nodes"}
END = {"t": 110.0, "event": "run_finished", "generation": 2, "steps": 3, "wall_s": 10.0}


def commit(step: int, t: float, nodes: int = 3) -> dict[str, Any]:
    fields = {"loss": 2.5, "tokens": 10, "num_nodes": nodes, "wall_s": 0.5, "step": step}
    return {"t": t, "event": "step_committed", "generation": 1, **fields}


RUNNING = [START, PLAN, commit(1, 101.0), commit(2, 102.0)]


@pytest.mark.parametrize(
    ("events", "phase", "nodes"),
    [
        ([], "STARTING", 0),
        (RUNNING, "RUNNING", 3),
        ([*RUNNING, LOST], "RECONFIGURING", 2),
        ([*RUNNING, LOST, commit(3, 103.3, 2), BACK], "RUNNING", 2),
        ([*RUNNING, LOST, HOLD], "HOLDING", 2),
        ([*RUNNING, END], "ENDED", 3),
        ([*RUNNING, END, START | {"t": 200.0}], "RUNNING", 3),
    ],
)
def test_the_phase_follows_from_the_last_telling_event(
    events: list[dict[str, Any]], phase: str, nodes: int
) -> None:
    status = status_of(events, now_s=105.0)
    assert (status.phase, status.nodes) == (phase, nodes)
    assert describe(status).startswith(f"phase {phase}")


def test_the_line_says_step_age_floor_and_last_reconfiguration() -> None:
    line = describe(status_of([*RUNNING, LOST, commit(3, 103.3, 2), BACK], now_s=110.0))
    assert "generation 2  step 3/40  loss 2.500  last commit 6.70 s ago  nodes 2/3" in line
    assert "floor 2/2  last reconfiguration 0.40 s, 6.60 s ago  1 node lost  0 steps lost" in line
    assert "holding: 1 of 2 nodes" in describe(status_of([*RUNNING, HOLD], now_s=110.0))


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs" / "20261121-demo"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(map(encode, [*RUNNING, LOST, BACK, END])))
    monkeypatch.chdir(tmp_path)
    return folder


def test_status_and_events_find_a_run_by_folder_or_name(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (str(record), "demo"):
        assert cli.main(["status", name, "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["schema"], status["phase"], status["step"]) == (1, "ENDED", 2)
    assert cli.main(["events", "demo", "--json", "--follow"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert cli.main(["events", "demo"]) == 0
    out = capsys.readouterr().out
    assert "x node 1 lost (stream closed) in step 3: back in 0.40 s" in out
    assert "step 2  loss 2.500  3 nodes  0.50 s" in out


def test_since_leaves_out_what_is_older_and_must_be_a_duration(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["events", "demo", "--since", "1h"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["events", "demo", "--since", "yesterday"]) == 2
    assert "not a duration such as 30s" in capsys.readouterr().err


def test_an_unknown_run_is_bad_input(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "nothing"]) == 2
    assert "no run nothing" in capsys.readouterr().err


def test_the_doctor_names_every_dependency_and_finds_this_machine_fit() -> None:
    findings = examine(os.environ)
    names = {f.name for f in findings}
    assert {"python", "torch", "ray", "memory", "loopback", "ray auth"} <= names
    assert not [f for f in findings if f.level == "fail" and f.name != "memory"]
    assert all(f.fix for f in findings if f.level != "ok")


def test_the_doctor_knows_rays_token_trap(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    trap = {f.name: f for f in examine({"HOME": str(tmp_path)})}["ray auth"]
    assert trap.level == "warn" and "RAY_AUTH_MODE=token" in trap.fix


def test_ages_do_not_follow_a_wall_clock_that_was_set() -> None:
    """B1, B3: times of day jump in the middle of the record; what is subtracted is ``m``."""
    events = [
        {**RUNNING[0], "t": 7200.0, "m": 0.0},
        {**commit(1, 3601.0, 3), "m": 1.0},
        {**commit(2, 90_000.0, 3), "m": 2.5},
        {**LOST, "t": 100.0, "m": 4.0},
    ]
    status = status_of(events, now_s=102.0)
    assert (status.news_age_s, status.commit_age_s) == (2.0, 3.5)
    assert status.summary.wall_s == 4.0
    assert status_of(events, now_s=-1e6).news_age_s == 0.0

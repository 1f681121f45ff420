"""Fuzz over our text files: a right result, or one line that names the file. Never a hang."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from mutations import mutated

from lazarus import cli
from lazarus.checkpoint.files.store import find_checkpoints
from lazarus.checkpoint.files.verify import newest_usable
from lazarus.checkpoint.format.manifest import manifest_path
from lazarus.checkpoint.testing import ToyState
from lazarus.commands.plan import read_load
from lazarus.config.train_config import TrainConfig
from lazarus.control.cluster.state import ControlConfig
from lazarus.errors import ConfigError, JournalError, RecordError
from lazarus.record import journal_reader
from lazarus.record.events import read_events
from lazarus.runtime.controller.folding import find_journal
from lazarus.runtime.controller.journal import Journal
from lazarus.simulate.inputs.traces import read_trace

SAMPLE, ALL = 150, 2000

Reader = Callable[[Path], object]


def a_record() -> bytes:
    common = {"t": 1e9, "m": 1.0, "generation": 1}
    commit = {"loss": 2.5, "tokens": 10, "num_nodes": 3, "wall_s": 0.5}
    back = {"reason": "loss", "wall_s": 0.4, "phases": {"plan": 0.1}, "moves": 1, "bytes_moved": 9}
    plan = {"digest": "ab", "floor": 2, "requested_floor": 2, "nodes": [0, 1, 2]}
    events = [
        {"event": "run_started", "num_nodes": 3, "world_size": 3, "schema": 1, "steps": 9},
        {"event": "plan_adopted", **plan, "experts_of_rank": [[[0, 1], [1, 2], [0, 2]]]},
        *({"event": "step_committed", "step": s, **commit} for s in (1, 2, 3)),
        {"event": "fault_injected", "node": 1, "kind": "kill", "step": 4},
        {"event": "node_lost", "node": 1, "cause": "stream closed"},
        {"event": "reconfigured", **back, "num_nodes": 2, "lost": [1], "joined": [], "step": 3},
        {"event": "checkpoint_persisted", "step": 3, "bytes": 9, "wall_s": 0.1},
        {"event": "run_finished", "steps": 3, "wall_s": 9.0, "status": "finished", "cause": ""},
    ]
    return b"".join(json.dumps({**common, **event}).encode() + b"\n" for event in events)


TRACE = b"""0,add,node0
0,add,node1
60000,remove,node1
[90000, "add", {"nodes": ["node2", "node3"]}]
120000,remove,node0
"""


def reads_record(folder: Path) -> None:
    read_events(folder)


def shows_record(folder: Path) -> None:
    for command in ("status", "events", "report"):
        assert cli.main([command, str(folder)]) in (0, 2)


def reads_journal(folder: Path) -> None:
    found = find_journal(folder, ControlConfig(steps=3))
    assert found.whole().state.generation in (0, 1)
    journal_reader.read_journal(folder)


def reads_config(folder: Path) -> None:
    TrainConfig.load(folder / "config.toml")


def reads_trace(folder: Path) -> None:
    assert read_trace(folder / "trace.csv").events


def reads_load(folder: Path) -> None:
    (path,) = folder.iterdir()
    try:
        load = read_load(str(path), experts=None, layers=None)
    except ValueError as problem:  # as the command shows it
        raise ConfigError(str(problem)) from problem
    assert np.isfinite(load).all()


def reads_manifest(folder: Path) -> None:
    """The checkpoint before it is used where this one is damaged."""
    assert newest_usable(str(folder.parent)).step in (200, 300)


def shows_manifest(folder: Path) -> None:
    for command in ("list", "verify"):
        assert cli.main(["checkpoint", command, str(folder.parent)]) in (0, 1)


def a_journal(folder: Path) -> None:
    journal = Journal(folder)
    journal.append({"kind": "header", "run": "r", "format": 2})
    journal.append({"kind": "serial", "term": 1, "node": 0, "key": "a"})
    journal.append({"kind": "claim", "term": 1, "generation": 1, "members": [0]})


def blow(path: Path, rng: Random, read: Reader, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the damage was noticed; then the file is named in one line."""
    whole = path.read_bytes()
    path.write_bytes(mutated(whole, rng))
    try:
        read(path.parent)
    except (ConfigError, JournalError, RecordError) as error:
        problem = str(error)
    else:
        problem = ""
    path.write_bytes(whole)
    said = problem or capsys.readouterr().err
    assert "Traceback" not in said and len(said) < 20_000
    assert not said or path.name in said or str(path.parent) in said
    return bool(said)


def fuzz(path: Path, read: Reader, capsys: pytest.CaptureFixture[str], count: int) -> None:
    noticed = sum(blow(path, Random(seed), read, capsys) for seed in range(count))
    assert noticed > count / 3, "the damage was hardly ever noticed"
    read(path.parent)


COUNTS = [
    pytest.param(SAMPLE, id="sample"),
    pytest.param(ALL, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["000000001.json", "000000003.json"])
def test_damaged_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, name: str
) -> None:
    """D10, D11"""
    a_journal(tmp_path)
    fuzz(tmp_path / name, reads_journal, capsys, count)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    """D10"""
    path = tmp_path / "events.jsonl"
    path.write_bytes(a_record())
    assert len(read_events(path)) == 10
    fuzz(path, reads_record, capsys, count)
    fuzz(path, shows_record, capsys, count // 10)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """D10"""
    path = tmp_path / "config.toml"
    path.write_text(TrainConfig().to_toml())
    fuzz(path, reads_config, capsys, count)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(TRACE)
    fuzz(path, reads_trace, capsys, count)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_manifests(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """D10: an older sound checkpoint is used."""
    for step in (200, 300):
        ToyState().save(str(tmp_path), step)
    path = tmp_path / manifest_path(300)
    whole, older = path.read_bytes(), 0
    for seed in range(count):
        path.write_bytes(mutated(whole, Random(seed)))
        reads_manifest(path.parent)
        if seed % 10 == 0:
            shows_manifest(path.parent)
        older += newest_usable(str(tmp_path)).step == 200
        for _, problem in find_checkpoints(str(tmp_path)).unreadable:
            assert manifest_path(300) in str(problem) and "\n" not in str(problem)
    assert older > count / 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["load.json", "load.npy", "load.npz"])
def test_damaged_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, name: str
) -> None:
    path = tmp_path / name
    load = np.arange(24.0).reshape(2, 12)
    if name.endswith("json"):
        path.write_text(json.dumps(load.tolist()))
    elif name.endswith("npy"):
        np.save(path, load)
    else:
        np.savez(path, load=load)
    fuzz(path, reads_load, capsys, count)


def place_fifo(path: Path) -> None:
    os.mkfifo(path)


def place_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def place_folder(path: Path) -> None:
    path.mkdir()


PLACES = pytest.mark.parametrize("place", [place_fifo, place_device, place_folder])


@PLACES
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("000000002.json", reads_journal),
        ("state/000000003.json", reads_journal),
        ("config.toml", reads_config),
        ("trace.csv", reads_trace),
    ],
)
def test_what_is_no_file_is_named_and_never_read(
    tmp_path: Path, name: str, read: Reader, place: Callable[[Path], None]
) -> None:
    """D10: a fifo, a link to /dev/zero, a folder in place of a file."""
    a_journal(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if name.startswith("state"):
        (tmp_path / "000000001.json").unlink()  # nothing but the state could tell
    place(tmp_path / name)
    with pytest.raises((ConfigError, JournalError), match=re.escape(name)):
        read(tmp_path)


@PLACES
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["events.jsonl", "config.toml", "journal/000000002.json"])
def test_commands_never_hang_and_never_trace(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    place: Callable[[Path], None],
) -> None:
    """D10: every command that reads a run's folder."""
    (tmp_path / "events.jsonl").write_bytes(a_record())
    a_journal(tmp_path / "journal")
    (tmp_path / "config.toml").write_text(TrainConfig().to_toml())
    (tmp_path / name).unlink()
    place(tmp_path / name)
    for command in ("status", "events", "report"):
        code = cli.main([command, str(tmp_path)])
        assert code == (2 if name == "events.jsonl" else 0)
        said = capsys.readouterr().err
        assert "Traceback" not in said and (code == 0 or str(tmp_path) in said)
    for command in ("list", "verify"):
        assert cli.main(["checkpoint", command, str(tmp_path)]) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path), "--dry-run"]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


@PLACES
@pytest.mark.timeout(60)
def test_a_manifest_that_is_no_file_costs_one_checkpoint(
    tmp_path: Path, place: Callable[[Path], None]
) -> None:
    """D10: verify hung on it."""
    for step in (200, 300):
        ToyState().save(str(tmp_path), step)
    path = tmp_path / manifest_path(300)
    path.unlink()
    place(path)
    reads_manifest(path.parent)
    assert newest_usable(str(tmp_path)).step == 200

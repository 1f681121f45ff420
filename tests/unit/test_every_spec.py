"""Every field of what the driver hands to a process is used there; a new one needs an entry."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from one_rank import Orders, orders_of, spec_of

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.run.run_place import open_place
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.spec import ControllerSpec, RunSpec, WorkerSpec
from lazarus.runtime.worker.process import Worker

SMALL = ["cluster.launcher=process", "cluster.nodes=1", "checkpoint.every=5"]
RUNTIME = Path(__file__).resolve().parents[2] / "lazarus" / "runtime"


def orders(folder: Path) -> Orders:
    config = TrainConfig.load(overrides=[*SMALL, f"run.dir={folder}/run"])
    place = open_place(config, resume=None)
    try:
        return orders_of(spec_of(ElasticTrainer(place.config), place, folder / "scratch"))
    finally:
        place.leave()


def worker(spec: WorkerSpec) -> Any:
    """What a worker says of itself, whom it calls, and how long it waits."""
    made = Worker(spec)
    return made._hello(), made._link._address, made._link._credentials, made._timeouts


# Changed fields of a worker's spec that it says or does at once; the others are read by its rank.
AT_HELLO: Mapping[str, Any] = {
    "worker": "n7.0",
    "node_key": "n7",
    "local_rank": 1,
    "ranks_per_node": 2,
    "host": "127.0.0.2",
    "controller": "127.0.0.1:2",
    "credentials": Credentials(secret="another"),
    "config": TrainConfig.load(overrides=["recovery.tolerated_stall_s=3"]),
    "keeper": "127.0.0.1:3",
    "zone": "b",
    "memory_share": 0.5,
    "resume": CheckpointRef("/ckpt", 7),
}
BY_ITS_RANK = {"run_id", "user", "node_folder", "faults", "checkpoint_url"}


def test_every_field_of_a_workers_spec_has_an_entry() -> None:
    assert {*AT_HELLO, *BY_ITS_RANK} == {f.name for f in fields(WorkerSpec)}


@pytest.mark.parametrize("name", AT_HELLO)
def test_a_worker_goes_by_its_spec(name: str, tmp_path: Path) -> None:
    (spec,) = orders(tmp_path).workers
    assert worker(spec) != worker(replace(spec, **{name: AT_HELLO[name]}))


# Where each spec is read, and by which names it goes there.
READERS: Mapping[type, tuple[str, str]] = {
    RunSpec: ("spec|_spec", "driver"),
    ControllerSpec: ("spec|_spec", "controller"),
    WorkerSpec: ("spec|_spec", "worker|comm"),
    KeeperConfig: ("config", "keeper"),
    Credentials: ("credentials", "rpc"),
}


def names_read(names: str, rooms: str) -> set[str]:
    """Attributes that the modules of some rooms read of what goes by these names."""
    found: set[str] = set()
    for path in (path for room in rooms.split("|") for path in (RUNTIME / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                of = node.value
                name = of.id if isinstance(of, ast.Name) else getattr(of, "attr", "")
                if name in names.split("|"):
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("spec", READERS, ids=lambda spec: spec.__name__)
def test_every_field_is_read_by_who_is_handed_it(spec: type) -> None:
    names, rooms = READERS[spec]
    given = {f.name for f in fields(spec)}
    assert given - names_read(names, rooms) == set()


def test_what_the_driver_hands_out_is_the_runs(tmp_path: Path) -> None:
    """The same secret and the same run for every process; nobody copies fields of credentials."""
    told = orders(tmp_path)
    (spec,) = told.workers
    keeper, control = told.keeper, told.controller.config
    assert keeper is not None
    assert spec.credentials is keeper.credentials is told.controller.credentials
    assert spec.config is told.spec.config and control is told.spec.control
    assert spec.run_id == keeper.job == control.run_id
    assert (spec.checkpoint_url, spec.faults) == (control.checkpoint_url, control.faults)
    assert keeper.silent_s == spec.config.timeouts.keeper_silent_s
    assert told.controller.keep_checkpoints == spec.config.checkpoint.keep

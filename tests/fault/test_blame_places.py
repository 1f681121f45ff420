"""Checkpoint places that refuse, that only some nodes see, or that belong to another run."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from fault_runs import SMALL, Event, Watched, watch

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.files.verify import verify
from lazarus.errors import ConfigError, LostExpertError, StorageError
from lazarus.record.events import read_events

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUICK = ("metrics.report=false", "recovery.tolerated_stall_s=3")
FULL = (*QUICK, "checkpoint.full_at_end=true")
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # of Linux


def contents(place: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


# ---- a place that only some nodes see ------------------------------------------------------------


class Apart:
    """A machine that has a disk of its own where the others have the shared folder."""

    def __init__(self, place: Path, *, nodes: tuple[int, ...]) -> None:
        self.place, self.nodes = place, nodes

    def on_setup(self, ctx: Any, model: Any) -> None:
        if ctx.node in self.nodes:
            mount_privately(self.place)


def mount_privately(place: Path) -> None:
    """Let this thread, and threads that it starts, see an empty disk there, and nobody else."""
    place.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, None),
    ):
        if done != 0:
            raise OSError(ctypes.get_errno(), "a disk of its own cannot be mounted")


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk can be mounted by root only")
def test_a_folder_that_one_node_does_not_share_ends_the_run_before_its_first_step(
    tmp_path: Path,
) -> None:
    """C5: each node looks for what the next one wrote; the error names who does not see it."""
    place, folder = tmp_path / "shared", tmp_path / "run"
    place.mkdir()
    settings = (f"checkpoint.url={place}", *FULL)
    with pytest.raises(StorageError) as caught:
        watch(folder, nodes=3, steps=5, settings=settings, hooks=[Apart(place, nodes=(1,))])
    text = str(caught.value)
    assert "the checkpoint place cannot be used from node 0 and 1" in text
    assert "node 0 does not see what node 1 wrote: is it shared?" in text
    assert "set checkpoint.url to a place that every node can write to" in text
    events = read_events(folder)
    assert (events[-1]["status"], events[-1]["cause"]) == ("failed", "storage")
    assert not [e for e in events if e["event"] in ("node_lost", "step_committed")]
    assert not contents(place), "probes are swept"


# ---- storage that refuses while an expert is restored --------------------------------------------

STEP = 8  # of the checkpoint that is complete when the only holders of some experts die


class Gate:
    """Holds nodes 0 and 1 behind a step until the driver has acted: pipes opened at both ends."""

    def __init__(self, pipes: tuple[Path, ...]) -> None:
        self.pipes = pipes

    def on_commit(self, ctx: Any, step: int) -> None:
        if ctx.node < len(self.pipes) and step == STEP + 1:
            self.pipes[ctx.node].open().close()


def only_held_by(events: list[Event], nodes: set[int]) -> list[tuple[int, int]]:
    """Experts that nobody else holds in the first plan."""
    plan = next(e for e in events if e["event"] == "plan_adopted")
    held: dict[tuple[int, int], set[int]] = {}
    for layer, ranks in enumerate(plan["experts_of_rank"]):
        for node, experts in zip(plan["nodes"], ranks, strict=True):
            for expert in experts:
                held.setdefault((layer, expert), set()).add(node)
    return sorted(expert for expert, holders in held.items() if holders <= nodes)


def refuse(watched: Watched, *, steps: tuple[int, ...]) -> tuple[int, int]:
    """Let storage refuse one expert's files of these steps: the links there lead nowhere."""
    layer, expert = only_held_by(list(read_events(watched.folder)), {0, 1})[0]
    for step in steps:
        (path,) = (watched.folder / "checkpoints").glob(f"*{step}/L{layer:02d}-E{expert:03d}.*")
        path.unlink()
        path.symlink_to(path)
    return layer, expert


def restore_while_refused(folder: Path, *, steps: tuple[int, ...]) -> tuple[int, int]:
    """Run until some experts must come from storage, which refuses one of them; returns that."""
    pipes, chosen = (folder.parent / "gate-0", folder.parent / "gate-1"), list[tuple[int, int]]()
    for pipe in pipes:
        os.mkfifo(pipe)

    def act(watched: Watched) -> None:
        chosen.append(refuse(watched, steps=steps))
        for pipe in pipes:
            pipe.open("w").close()

    try:
        watch(
            folder,
            *(f"kill:{node}@{STEP + 2}" for node in (0, 1)),
            nodes=4,
            steps=STEP + 6,
            settings=(
                "metrics.report=false",
                "recovery.tolerated_stall_s=20",
                "placement.slots_per_node=3",
                "checkpoint.every=4",
                "checkpoint.select=full",
                "checkpoint.copies=0",
                "checkpoint.keep=5",
            ),
            acts=[(lambda e: e["event"] == "checkpoint_persisted" and e["step"] == STEP, act)],
            hooks=[Gate(pipes)],
        )
    finally:
        events = read_events(folder)
        assert {e["node"] for e in events if e["event"] == "node_lost"} == {0, 1}
    return chosen[0]


def test_storage_that_refuses_one_file_gives_the_version_before(tmp_path: Path) -> None:
    """C6: the next source, and nobody is lost who did not die."""
    folder = tmp_path / "run"
    expert = restore_while_refused(folder, steps=(STEP,))
    events = read_events(folder)
    restored = {
        (e["layer"], e["expert"]): e["step"] - e["behind_steps"]
        for e in events
        if e["event"] == "expert_restored"
    }
    assert set(restored) == set(only_held_by(events, {0, 1}))
    assert restored.pop(expert) == STEP - 4
    assert set(restored.values()) <= {STEP}
    assert events[-1]["status"] == "finished"


def test_storage_that_refuses_every_version_of_an_expert_ends_the_run_as_its_cause(
    tmp_path: Path,
) -> None:
    """C6: initial weights are no source while storage holds better ones."""
    folder = tmp_path / "run"
    with pytest.raises(LostExpertError) as caught:
        restore_while_refused(folder, steps=(STEP - 4, STEP))
    text = str(caught.value)
    assert "Too many levels of symbolic links" in text, "what storage said"
    assert "see to the storage, then resume the run" in text
    assert caught.value.exit_code == 3
    end = read_events(folder)[-1]
    assert (end["status"], end["cause"]) == ("short", "storage")


# ---- a place that belongs to another run ---------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where another run, over by now, left the checkpoint of its third step."""
    place = tmp_path_factory.mktemp("other") / "checkpoints"
    watch(place.parent / "run", nodes=2, steps=3, settings=(f"checkpoint.url={place}", *FULL))
    return place


def copied(other: Path, to: Path) -> dict[str, bytes]:
    shutil.copytree(other, to, dirs_exist_ok=True)
    return contents(to)


def test_a_new_run_does_not_begin_where_another_has_its_checkpoints(
    other: Path, tmp_path: Path
) -> None:
    """A run without a resume would overwrite them step by step; nothing of it is left."""
    place, folder = tmp_path / "place", tmp_path / "run"
    before = copied(other, place)
    settings = (f"checkpoint.url={place}", *FULL)
    with pytest.raises(ConfigError) as caught:
        watch(folder, nodes=2, steps=5, settings=settings)
    text = str(caught.value)
    assert f"{place} already holds checkpoints of another run (step 3)" in text
    assert f"give another checkpoint.url, or go on from them with --resume {place}" in text
    assert caught.value.exit_code == 2
    assert contents(place) == before and not folder.exists()
    config = (*settings, f"run.dir={folder}", "cluster.nodes=2", "train.steps=5")
    result = ElasticTrainer(TrainConfig.load(overrides=[*SMALL, *config])).fit(resume=str(place))
    assert result.status == "finished" and verify(str(place)).usable[-1] == 5


def test_a_run_that_goes_on_elsewhere_does_not_go_where_a_third_run_is(
    other: Path, tmp_path: Path
) -> None:
    """The same for a run that resumes from one place and keeps its checkpoints at another."""
    own, place = tmp_path / "own", tmp_path / "place"
    before = copied(other, place)
    watch(tmp_path / "one", nodes=2, steps=2, settings=(f"checkpoint.url={own}", *FULL))
    config = (*FULL, f"checkpoint.url={place}", f"run.dir={tmp_path / 'two'}", "cluster.nodes=2")
    trainer = ElasticTrainer(TrainConfig.load(overrides=[*SMALL, *config, "train.steps=5"]))
    with pytest.raises(ConfigError, match="already holds checkpoints of another run"):
        trainer.fit(resume=str(own))
    assert contents(place) == before


class Comes:
    """Another run that writes into the same place while this one starts."""

    def __init__(self, other: Path, place: Path) -> None:
        self.other, self.place = other, place

    def on_setup(self, ctx: Any, model: Any) -> None:
        if ctx.node == 0:
            shutil.copytree(self.other, self.place, dirs_exist_ok=True)


def test_of_two_runs_that_begin_at_one_place_the_later_write_gives_way(
    other: Path, tmp_path: Path
) -> None:
    """Neither could be refused at its start: the checkpoint of one is kept, the other's rescued."""
    place, folder = tmp_path / "place", tmp_path / "run"
    settings = (f"checkpoint.url={place}", "checkpoint.keep=1", *FULL)
    with pytest.raises(StorageError) as caught:
        watch(folder, nodes=2, steps=3, settings=settings, hooks=[Comes(other, place)])
    assert "the checkpoint of step 3 in" in str(caught.value)
    assert "belongs to another run" in str(caught.value)
    assert caught.value.exit_code == 3 and str(folder / "rescue") in str(caught.value)
    assert contents(place) == contents(other)
    assert verify(str(folder / "rescue")).usable == (3,)
    assert not [e for e in read_events(folder) if e["event"] == "node_lost"]

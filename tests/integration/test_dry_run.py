"""A dry run says what the run would begin with, and refuses what the run would refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SMALL

from lazarus import ElasticTrainer, TrainConfig, cli
from lazarus.errors import ConfigError
from lazarus.record.events import of_kind, read_events
from lazarus.run.dry_run import first_plan
from lazarus.run.run_place import open_place
from placement import Plan

SETTINGS = (*SMALL, "metrics.report=false", "recovery.tolerated_stall_s=30", "train.steps=1")


CONFIGURATIONS = {
    "own policy": (3, ["placement.policy=dry_policies:Skewed"]),
    "zones, ilp, weight": (
        3,
        ["placement.domains=zone", "placement.solver=ilp", "placement.resilience_weight=0.25"],
    ),
    "floor and automatic slots": (4, ["placement.min_replicas=3", "placement.slots_per_node=auto"]),
    "slots, two ranks a node": (2, ["placement.slots_per_node=8", "cluster.ranks_per_node=2"]),
}


def config_of(folder: Path, *, nodes: int, settings: Sequence[str]) -> TrainConfig:
    overrides = [*SETTINGS, f"cluster.nodes={nodes}", f"run.dir={folder}", *settings]
    return TrainConfig.load(overrides=overrides)


def dry(config: TrainConfig, *, resume: str | None = None) -> Plan:
    place = open_place(config, resume=resume)
    return first_plan(ElasticTrainer(place.config), place)


def really(config: TrainConfig, *, resume: str | None = None) -> dict[str, Any]:
    ElasticTrainer(config).fit(resume=resume)
    return dict(of_kind(read_events(Path(config.run.dir)), "plan_adopted")[0])


def assert_same(planned: Plan, adopted: dict[str, Any]) -> None:
    assert planned.digest == adopted["digest"]
    assert (list(planned.node_ids), planned.method) == (adopted["nodes"], adopted["method"])
    assert planned.slots_per_node == adopted["slots_per_node"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_plan_is_the_first_one_of_the_run(name: str, tmp_path: Path) -> None:
    nodes, settings = CONFIGURATIONS[name]
    config = config_of(tmp_path / "run", nodes=nodes, settings=settings)
    planned = dry(config)
    assert list(tmp_path.iterdir()) == []
    assert_same(planned, really(config))


@pytest.mark.slow
def test_memory_that_holds_fewer_slots_than_are_wanted_does_so_in_both(tmp_path: Path) -> None:
    """The fraction of this machine's memory that holds four slots a node is bisected."""
    low, high = 1e-9, 1.0  # not even every expert once; all six that are wanted
    for _ in range(40):
        fraction = math.sqrt(low * high)
        settings = ["placement.slots_per_node=auto", f"placement.memory_fraction={fraction}"]
        config = config_of(tmp_path / "run", nodes=2, settings=settings)
        try:
            planned = dry(config)
        except ConfigError:
            low = fraction
            continue
        if planned.slots_per_node == 4:
            assert_same(planned, really(config))
            return
        low, high = (fraction, high) if planned.slots_per_node < 4 else (low, fraction)
    pytest.fail(f"no fraction between {low} and {high} holds four slots")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_goes_on_begins_with_the_plan_of_its_loads(tmp_path: Path) -> None:
    saves = ["train.steps=3", "checkpoint.full_at_end=true"]
    really(config_of(tmp_path / "first", nodes=3, settings=saves))
    place = str(tmp_path / "first" / "checkpoints")
    fresh = dry(config_of(tmp_path / "x", nodes=3, settings=["train.steps=4"]))
    for nodes in (2, 4):
        more = ["train.steps=4", "placement.slots_per_node=5"]
        config = config_of(tmp_path / f"on-{nodes}", nodes=nodes, settings=more)
        planned = dry(config, resume=place)
        assert planned.digest != fresh.digest
        assert_same(planned, really(config, resume=place))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The errors of a dry run; the run has the same ones, and neither leaves anything."""
    said = []
    for dry_run in (["--dry-run"], []):
        words = [w for text in (*SETTINGS, "run.dir=made") for w in ("--set", text)]
        code = cli.main(["train", *words, *arguments, *dry_run])
        errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
        assert code == 2, errors
        assert errors and not Path("made").exists()
        said.append([re.sub("-[0-9a-f]{8}", "-ID", error) for error in errors])
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["placement.policy=dry_policies:Absent"], "cannot be imported"),
        (["placement.policy=dry_policies:Wanting"], "cannot be made"),
        (["recovery.policy=dry_policies:Skewed"], "a RecoveryPolicy is called with"),
        (["checkpoint.url=gs://bucket/x", "checkpoint.every=5"], "checkpoint.url = gs://bucket/x"),
        (["checkpoint.url=file:///proc/here", "checkpoint.every=5"], "/proc/here cannot be used"),
        (["security.bind=300.1.2.3"], "security.bind = '300.1.2.3': nothing on this machine can"),
        (["security.bind=192.0.2.7"], "security.bind = '192.0.2.7': nothing on this machine can"),
        (["security.bind=a..b"], "security.bind = 'a..b': nothing on this machine can"),
        (["metrics.wandb_project=x"], "needs the package wandb"),
    ],
)
def test_what_the_run_refuses_a_dry_run_refuses(
    settings: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [w for text in settings for w in ("--set", text)]
    assert any(words in error for error in refused(capsys, *arguments))


def test_a_bad_resume_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    (error,) = refused(capsys, "--resume", str(here / "empty"))
    assert "no checkpoint at" in error


def test_a_dry_run_prints_the_certificate_and_leaves_no_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for text in (*SETTINGS, "run.dir=made") for w in ("--set", text)]
    assert cli.main(["train", *words, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "survives losses of" in told.out
    assert "6 experts x 2 layers on 4 nodes x 4 slots" in told.err
    assert list(here.iterdir()) == []

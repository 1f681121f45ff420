"""A resumed run is the run that it was: what may change, and what stops it."""

from pathlib import Path

import pytest

from lazarus import cli
from lazarus.config.changes import decisive, resume_problems
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError

BEFORE = TrainConfig.load(preset="tiny")


@pytest.mark.parametrize(
    "change",
    [
        "cluster.nodes=9",
        "train.steps=5000",
        "placement.min_replicas=3",
        "checkpoint.every=7",
        "dispatch.mode=shares",
    ],
)
def test_size_placement_and_length_may_change(change: str) -> None:
    assert (
        resume_problems(decisive(BEFORE), TrainConfig.load(preset="tiny", overrides=[change])) == []
    )


@pytest.mark.parametrize(
    "change",
    ["model.dim=64", "data.num_shards=8", "train.global_batch=8", "run.seed=3", "optim.lr=1.0"],
)
def test_what_decides_the_mathematics_must_not(change: str) -> None:
    now = TrainConfig.load(preset="tiny", overrides=[change])
    (problem,) = resume_problems(decisive(BEFORE), now)
    key = change.split("=")[0]
    assert f"{key} changed since the run began" in str(problem)
    assert resume_problems(decisive(BEFORE), now, allowed=[key]) == []


def test_allowing_a_key_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--allow-change model.dimm: there is no such key"):
        resume_problems(decisive(BEFORE), BEFORE, allowed=["model.dimm"])


def test_the_command_line_lists_every_difference_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(BEFORE.to_toml())
    (tmp_path / "events.jsonl").write_text("")
    code = cli.main(["train", "--resume", str(tmp_path), "--set", "model.dim=64", "--seed", "5"])
    assert code == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
    assert len(errors) == 3
    assert "--allow-change run.seed" in errors[0]
    assert "model.dim changed since the run began: 128 -> 64" in errors[1]
    assert "no checkpoint at" in errors[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.toml", "events.jsonl"]

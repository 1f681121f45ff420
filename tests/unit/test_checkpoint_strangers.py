"""A place of checkpoints that belongs to another run: nothing there is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.errors import ForeignCheckpointError
from lazarus.checkpoint.files.store import Tag, load_manifest
from lazarus.checkpoint.testing import ToyState
from lazarus.errors import ConfigError
from lazarus.run.run_place import RunPlace, open_place

TOY = ToyState()


def tag(job: str) -> Tag:
    return Tag(job=job, term=1, generation=1)


def opened(folder: Path, url: str) -> RunPlace:
    config = TrainConfig.load(overrides=[f"run.dir={folder}", f"checkpoint.url={url}"])
    return open_place(config, resume=None)


def test_a_checkpoint_of_another_run_is_never_replaced(tmp_path: Path) -> None:
    url = str(tmp_path)
    TOY.save(url, 200, tag=tag("one"), lives={"one"})
    with pytest.raises(ForeignCheckpointError, match="step 200 in .* belongs to another run, one"):
        TOY.save(url, 200, tag=tag("two"), lives={"two"})
    assert load_manifest(url, 200).job == "one"
    TOY.save(url, 200, tag=tag("three"), lives={"one", "three"})
    assert load_manifest(url, 200).job == "three", "its own, by way of the run that it continues"


def test_a_new_run_is_refused_where_others_have_checkpoints(tmp_path: Path) -> None:
    url = str(tmp_path / "ckpt")
    free = opened(tmp_path / "first", url)
    free.check_checkpoints()
    free.leave()
    for step in (200, 400):
        TOY.save(url, step, tag=tag("one"), lives={"one"})
    place = opened(tmp_path / "run", url)
    with pytest.raises(ConfigError) as refused:
        place.check_checkpoints()
    place.leave()
    text = str(refused.value)
    assert f"{url} already holds checkpoints of another run (steps 200 to 400)" in text
    assert f"give another checkpoint.url, or go on from them with --resume {url}" in text
    assert not (tmp_path / "run").exists()


def test_a_manifest_that_cannot_be_read_belongs_to_somebody_too(tmp_path: Path) -> None:
    url = str(tmp_path / "ckpt")
    TOY.save(url, 200, tag=tag("one"))
    (manifest,) = (tmp_path / "ckpt").glob("*/manifest.json")
    manifest.write_text("{")
    place = opened(tmp_path / "run", url)
    with pytest.raises(ConfigError, match=r"checkpoints of another run \(step 200\)"):
        place.check_checkpoints()
    place.leave()


def test_the_trainer_starts_nothing_there(tmp_path: Path) -> None:
    url, folder = str(tmp_path / "ckpt"), tmp_path / "run"
    TOY.save(url, 200, tag=tag("one"), lives={"one"})
    before = sorted(tmp_path.rglob("*"))
    config = TrainConfig.load(overrides=[f"run.dir={folder}", f"checkpoint.url={url}"])
    with pytest.raises(ConfigError, match="already holds checkpoints of another run"):
        ElasticTrainer(config).fit()
    assert sorted(tmp_path.rglob("*")) == before

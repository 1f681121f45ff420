"""A run that never starts leaves no folders behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazarus import TrainConfig
from lazarus.run.run_place import open_place


@pytest.mark.parametrize("form", ["a/b/c", "a/{time}-{name}"])
def test_the_parents_that_were_made_for_a_run_go_with_its_folder(tmp_path: Path, form: str) -> None:
    config = TrainConfig.load(overrides=[f"run.dir={tmp_path}/{form}"])
    place = open_place(config, resume=None)
    assert place.folder.is_dir()
    place.leave()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_others_use_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = TrainConfig.load(overrides=[f"run.dir={tmp_path}/a/b/c"])
    place = open_place(config, resume=None)
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    place.leave()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["notes.txt"]

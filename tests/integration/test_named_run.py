"""``lazarus train`` runs functions of a module in the working directory, without a script."""

from __future__ import annotations

import shutil
from pathlib import Path

import named_functions
import pytest
from command_runs import Shell, steps_of

SETTINGS = (
    "model.builder=mine:model",
    "data.source=mine:data",
    "train.loss=mine:loss",
    "optim.builder=mine:descent",
    "cluster.nodes=2",
    "train.steps=4",
    "run.dir=out",
    "metrics.report=false",
)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    shutil.copy(named_functions.__file__, tmp_path / "mine.py")
    return Shell(tmp_path)


@pytest.mark.slow
def test_a_run_of_named_functions_trains_to_its_end(shell: Shell) -> None:
    code, said = shell.train(settings=SETTINGS)
    assert code == 0, said
    assert steps_of(shell.folder / "out") == [1, 2, 3, 4]
    assert 'builder = "mine:model"' in (shell.folder / "out" / "config.toml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_a_named_loss_names_its_line(shell: Shell) -> None:
    mine = shell.folder / "mine.py"
    mine.write_text(mine.read_text() + "\n\ndef bad(model, batch):\n    return 1 / 0\n")
    code, said = shell.train(settings=[*SETTINGS, "train.loss=mine:bad"])
    assert code == 1, said
    assert "ZeroDivisionError" in said and f"{mine}:" in said and "in bad" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_named_functions_goes_on_from_its_checkpoint(shell: Shell) -> None:
    saves = [*SETTINGS, "checkpoint.full_at_end=true"]
    code, said = shell.train(settings=saves)
    assert code == 0, said
    code, said = shell.train("--resume", "out", settings=[*saves, "train.steps=6"])
    assert code == 0, said
    assert steps_of(shell.folder / "out") == [1, 2, 3, 4, 5, 6]

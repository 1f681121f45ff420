"""Functions that the configuration names: what is imported, and what is refused at the start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import named_functions
import pytest
from fault_runs import SMALL

from lazarus import ElasticTrainer, TrainConfig, cli
from lazarus.errors import ConfigError, UserCodeError
from lazarus.run.named_code import NAMED, with_named

NOTHING: dict[str, Any] = dict.fromkeys(NAMED)
ALL = (
    "model.builder=named_functions:model",
    "data.source=named_functions:data",
    "train.loss=named_functions:loss",
    "optim.builder=named_functions:descent",
)


def test_each_key_gives_its_argument() -> None:
    assert with_named(TrainConfig.load(overrides=ALL), NOTHING) == {
        "model": named_functions.model,
        "data": named_functions.data,
        "loss": named_functions.loss,
        "optimizer": named_functions.descent,
    }


def test_an_argument_goes_before_the_key_whose_function_is_not_even_imported() -> None:
    config = TrainConfig.load(overrides=["train.loss=no_such_module:loss"])
    given = {**NOTHING, "loss": named_functions.doubled}
    assert with_named(config, given)["loss"] is named_functions.doubled


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("model.builder=no_such_module:build", "cannot be imported: No module named"),
        ("data.source=named_functions:absent", "cannot be imported: .* no attribute 'absent'"),
        ("train.loss=raises_at_import:loss", "cannot be imported: ValueError: on import"),
        ("train.loss=exits_at_import:loss", "cannot be imported: SystemExit: 3"),
        ("train.loss=named_functions:model", r"takes \(ctx.*it is called with \(model, batch\)"),
        ("optim.builder=named_functions:NUMBER", "is a int, which cannot be called"),
        ("optim.builder=descent", 'must be "package.module:function"'),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_in_one_line(
    setting: str, reason: str, dry_run: list[str], here: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(here))
    (here / "raises_at_import.py").write_text("raise ValueError('on import\\nand more')\n")
    (here / "exits_at_import.py").write_text("raise SystemExit(3)\n")
    words = [w for text in (*SMALL, "run.dir=made", setting) for w in ("--set", text)]
    assert cli.main(["train", *words, *dry_run]) == 2
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    key, _, name = setting.partition("=")
    assert re.search(f'{key} = "{name}" {reason}', error), error
    assert not (here / "made").exists()


def test_all_names_that_cannot_be_used_are_told_at_once() -> None:
    config = TrainConfig.load(overrides=["train.loss=a_b:c", "data.source=d_e:f"])
    with pytest.raises(ConfigError) as refusal:
        ElasticTrainer(config)
    assert {p.key for p in refusal.value.problems} == {"train.loss", "data.source"}
    assert all(p.where.startswith("--set ") for p in refusal.value.problems)


def test_a_dry_run_plans_for_the_experts_of_the_model_that_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for text in (*SMALL, "run.dir=made", *ALL) for w in ("--set", text)]
    assert cli.main(["train", *words, "--nodes", "3", "--dry-run"]) == 0
    assert "4 experts x 1 layers on 3 nodes" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_an_error_of_a_named_model_is_the_users(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "model.builder=named_functions:broken"
    words = [w for text in (*SMALL, "run.dir=made", setting) for w in ("--set", text)]
    assert cli.main(["train", *words, "--dry-run"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"error: build at .*named_functions\.py:\d+ in broken: ValueError", told), told
    assert UserCodeError.exit_code == 1


def test_data_that_is_named_has_no_held_out_part() -> None:
    with pytest.raises(ConfigError, match="needs held-out data"):
        ElasticTrainer(TrainConfig.load(overrides=[*ALL, "eval.every=5"]))

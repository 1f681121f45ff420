"""A Hugging Face folder is planned for, trained and written out by the command line alone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_olmoe
from command_runs import Shell
from hollow_files import MIXTRAL_8X7B, QWEN3_30B_A3B, hollow_folder

from lazarus import TrainConfig, cli
from lazarus.record.events import of_kind, read_events
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from lazarus.runtime.training.hollow import hollow_shape

ROOT = Path(__file__).parents[2]
FINETUNE = str(ROOT / "configs" / "olmoe-finetune.toml")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def dry(*arguments: str, settings: Sequence[str] = ()) -> int:
    words = [word for text in ("run.dir=made", *settings) for word in ("--set", text)]
    return cli.main(["train", *arguments, *words, "--dry-run"])


def test_a_hollow_models_sizes_are_those_of_the_model(here: Path) -> None:
    config = TrainConfig.load(overrides=[f"model.hf={small_olmoe.olmoe_folder(here / 'model')}"])
    replica = Replica(
        lambda: defaults.model(config),
        optimizer=defaults.optimizer(config),
        schedule=defaults.schedule(config),
        clip_norm=1.0,
        seed=0,
        device=defaults.torch.device("cpu"),
    )
    hollow = defaults.hollow_model(config)
    assert all(p.is_meta for p in hollow.parameters())
    assert hollow_shape(hollow, optimizer=defaults.optimizer(config)) == replica.shape()


def test_the_configuration_for_olmoe_plans_for_a_folder(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_olmoe.olmoe_folder(here / "model", max_position_embeddings=2048, num_experts=64)
    chats = small_olmoe.conversations(here / "chats.jsonl")
    given = [f"model.hf={folder}", f"data.path={chats}"]
    assert dry(FINETUNE, "--memory", "80GB", settings=given) == 0
    told = capsys.readouterr()
    assert "survives losses of" in told.out
    assert "64 experts x 2 layers on 8 nodes" in told.err
    assert "dense on each rank; 128 experts of" in told.err
    assert "of 596.0 GiB on each node" in told.err  # 8 ranks of 80 GB
    assert not (here / "made").exists()


def test_a_folder_of_another_kind_is_refused_by_its_dry_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_olmoe.olmoe_folder(here / "model")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace("320", "640"))
    (folder / "model.safetensors").write_bytes(b"")
    assert dry(settings=[f"model.hf={folder}"]) == 2
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert 'model.hf = "' in error and "is not a safetensors file" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dry-run", "--memory", "much"], "--memory: 'much' is no size, such as 5GB"),
        (["--memory", "80GB"], "--memory is for --dry-run"),
    ],
)
def test_memory_of_no_use_is_refused(
    arguments: list[str], reason: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments]) == 2
    assert f"error: {reason}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (QWEN3_30B_A3B, ["17.2 GiB dense on each rank; 6,144 experts of 54.0 MiB", "11 slots"]),
        (MIXTRAL_8X7B, ["256 experts of 2.0 GiB", "memory holds 0 slots"]),
    ],
)
def test_true_shapes_are_planned_for_in_little_memory_and_time(
    shape: Mapping[str, Any], words: list[str], tmp_path: Path
) -> None:
    """Eight devices of 80 GB do not hold them with their moments, eight of 640 GB do."""
    folder = hollow_folder(tmp_path / "model", shape)
    for memory, code in (("80GB", 2), ("640GB", 0)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lazarus", "train", "--dry-run", "--nodes", "8"),
                *("--memory", memory, "--set", f"model.hf={folder}"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        if code:
            assert all(word in done.stderr for word in words), done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
        assert after.ru_maxrss < 1.5 * 2**20  # KiB, the largest of all children so far


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("packing", ["true", "false"])
def test_conversations_are_learned_and_the_model_goes_out_again(packing: str, here: Path) -> None:
    folder = small_olmoe.olmoe_folder(here / "model")
    chats = small_olmoe.conversations(here / "chats.jsonl")
    shell = Shell(here)
    code, said = shell.train(
        settings=[
            f"model.hf={folder}", f"data.path={chats}", "data.tokenizer=hf",
            f"data.packing={packing}", "cluster.nodes=2", "train.steps=30", "optim.lr=0.01",
            "run.dir=out", "checkpoint.full_at_end=true", "eval.every=30", "data.split=0.8",
        ]
    )  # fmt: skip
    assert code == 0, said
    events = read_events(here / "out")
    losses = [event["loss"] for event in of_kind(events, "step_committed")]
    assert losses[-1] < 0.5 * losses[0]
    assert of_kind(events, "evaluated")
    words = ["checkpoint", "export", "out", "--layout", "hf", "--like", str(folder)]
    assert cli.main([*words, "--out", "tuned"]) == 0
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained("tuned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_example_trains_and_writes_its_model(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "hugging_face.py")],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 steps, loss ")
    assert (here / "trained" / "model.safetensors").is_file()
    assert len((ROOT / "examples" / "hugging_face.py").read_text().splitlines()) < 40

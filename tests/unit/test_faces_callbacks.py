"""Callbacks: records made of events, and the shipped ones against stand-ins for their packages."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lazarus.callbacks import Callback, Jsonl, TensorBoard, WandB, configured
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError
from lazarus.record.typed import Reconfiguration, StepRecord

START = {"t": 0.0, "event": "run_started", "generation": 1, "num_nodes": 2, "world_size": 2}
STEP = {
    "t": 1.0,
    "event": "step_committed",
    "generation": 1,
    "step": 1,
    "loss": 2.0,
    "tokens": 100,
    "num_nodes": 2,
    "wall_s": 0.5,
    "lr": 1e-3,
}
CHANGE = {
    "t": 2.0,
    "event": "reconfigured",
    "generation": 2,
    "reason": "node_lost",
    "wall_s": 0.3,
    "phases": {"plan": 0.1},
    "num_nodes": 1,
    "moves": 1,
    "bytes_moved": 5,
    "lost": [1],
}
END = {"t": 3.0, "event": "run_finished", "generation": 2, "steps": 1, "wall_s": 3.0, "plt": 0.0}
ALL = [START, STEP, CHANGE, {"t": 2.5, "event": "of_tomorrow", "generation": 2}, END]


def test_a_callback_gets_records_for_what_it_overrides() -> None:
    seen: list[Any] = []

    class Mine(Callback):
        def on_step(self, step: StepRecord) -> None:
            seen.append(step)

        def on_reconfigured(self, change: Reconfiguration) -> None:
            seen.append(change)

    mine = Mine()
    for event in [*ALL, STEP | {"loss": None}]:
        mine.on_event(event)
    assert seen[0].loss == 2.0
    assert seen[0].more == {"lr": 1e-3}
    assert seen[1].lost == (1,)
    assert math.isnan(seen[2].loss)


def test_jsonl_appends_every_event_and_closes_at_the_end(tmp_path: Path) -> None:
    callback = Jsonl(tmp_path / "a" / "events.jsonl")
    for event in ALL:
        callback.on_event(event)
    lines = callback.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == ALL


def test_tensorboard_gets_finite_scalars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[tuple[str, float, int]] = []
    closed: list[bool] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            assert log_dir == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            closed.append(True)

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    callback = TensorBoard(tmp_path)
    for event in [*ALL[:-1], STEP | {"loss": None, "step": 2}, END]:
        callback.on_event(event)
    assert ("train/loss", 2.0, 1) in written
    assert ("train/tokens_per_s", 200.0, 1) in written
    assert ("train/lr", 1e-3, 1) in written
    assert ("reconfiguration/wall_s", 0.3, 1) in written
    assert not [w for w in written if w[0] == "train/loss" and w[2] == 2]
    assert closed == [True]


def test_wandb_goes_on_with_the_same_run_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), summary={}, finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        callback = WandB("olmoe", run_dir=tmp_path, mode="offline")
        for event in ALL:
            callback.on_event(event)
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["mode"] == "offline"
    assert logged[0][0]["train/loss"] == 2.0


def test_a_missing_package_is_bad_input_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainConfig.load(overrides=["metrics.tensorboard=true", "metrics.wandb_project=olmoe"])
    with pytest.raises(ConfigError) as caught:
        configured(config, run_dir=tmp_path)
    assert [p.key for p in caught.value.problems] == [
        "metrics.tensorboard",
        "metrics.wandb_project",
    ]
    assert configured(TrainConfig.load(), run_dir=tmp_path) == []

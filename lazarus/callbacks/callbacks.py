"""Callbacks: told of what was committed, in the driver, after the fact; they never block training.

They need not pickle. An exception disables the callback with a warning, or fails the run with
``metrics.on_callback_error = "fail"``. Optional packages are imported when a run starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.record import typed
from lazarus.record.typed import (
    CheckpointRecord,
    EvalRecord,
    Event,
    Reconfiguration,
    RestoredExpert,
    RunEnd,
    RunRecord,
    StepRecord,
)


class Callback:
    """Override what you need. Runs in the driver, one event after the other."""

    def on_event(self, event: Event) -> None:
        """Every event of the record; hands it on to the methods below."""
        hand_on = _METHODS.get(event["event"])
        if hand_on is not None:
            hand_on(self, event)

    def on_run_start(self, run: RunRecord) -> None:
        """A run, or another life of it, begins."""

    def on_step(self, step: StepRecord) -> None:
        """A step is committed."""

    def on_eval(self, evaluation: EvalRecord) -> None:
        """A held-out loss is there."""

    def on_reconfigured(self, change: Reconfiguration) -> None:
        """Members or plan changed, and training goes on."""

    def on_expert_restored(self, expert: RestoredExpert) -> None:
        """An expert came back from a copy that may be behind."""

    def on_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """A checkpoint is durable."""

    def on_run_end(self, end: RunEnd) -> None:
        """The run is over."""


_METHODS: Mapping[str, Callable[[Callback, Event], None]] = {
    "run_started": lambda c, e: c.on_run_start(typed.run_record(e)),
    "step_committed": lambda c, e: c.on_step(typed.step_record(e)),
    "evaluated": lambda c, e: c.on_eval(typed.eval_record(e)),
    "reconfigured": lambda c, e: c.on_reconfigured(typed.reconfiguration(e)),
    "expert_restored": lambda c, e: c.on_expert_restored(typed.restored_expert(e)),
    "checkpoint_persisted": lambda c, e: c.on_checkpoint(typed.checkpoint_record(e)),
    "run_finished": lambda c, e: c.on_run_end(typed.run_end(e)),
}


class Jsonl(Callback):
    """Each event as one line of JSON, flushed at once: for a reader beside the run's own record."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_event(self, event: Event) -> None:
        """Write it."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(dict(event)) + "\n")
        self._file.flush()
        if event["event"] == "run_finished":
            self._file.close()
            self._file = None


class _Scalars(Callback):
    """What TensorBoard and W&B show: named numbers over steps."""

    def __init__(self) -> None:
        self._step = 0

    def on_step(self, step: StepRecord) -> None:
        """Loss, speed, nodes, and every number that the step carries."""
        self._step = step.step
        values = {"loss": step.loss, "num_nodes": float(step.num_nodes), "wall_s": step.wall_s}
        if step.wall_s > 0:
            values["tokens_per_s"] = step.tokens / step.wall_s
        for name, value in step.more.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values[name] = float(value)
        self.write({f"train/{k}": v for k, v in values.items() if math.isfinite(v)}, step.step)

    def on_eval(self, evaluation: EvalRecord) -> None:
        """The held-out loss."""
        if math.isfinite(evaluation.loss):
            self.write({"eval/loss": evaluation.loss}, evaluation.step)

    def on_reconfigured(self, change: Reconfiguration) -> None:
        """How long it took, by phase, and what was moved."""
        values = {f"reconfiguration/{k}_s": v for k, v in change.phases.items()}
        values |= {
            "reconfiguration/wall_s": change.wall_s,
            "reconfiguration/bytes_moved": float(change.bytes_moved),
        }
        self.write(values, self._step)

    def on_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Size and time."""
        values = {
            "checkpoint/bytes": float(checkpoint.bytes),
            "checkpoint/wall_s": checkpoint.wall_s,
        }
        self.write(values, checkpoint.step)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers to where they are shown."""
        raise NotImplementedError


class TensorBoard(_Scalars):
    """Event files in ``log_dir``. Needs the package tensorboard."""

    def __init__(self, log_dir: str | Path) -> None:
        super().__init__()
        self.log_dir = Path(log_dir)
        self._writer: Any = None

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        if self._writer is None:
            module = _optional("torch.utils.tensorboard", extra="tensorboard")
            self._writer = module.SummaryWriter(str(self.log_dir))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_run_end(self, end: RunEnd) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(_Scalars):
    """A Weights & Biases run; the same one after a restart, if the run's folder is the same.

    Args:
        project: The project.
        run_dir: Where the run's id is kept. Without it each start is a new W&B run.
        options: Further arguments of ``wandb.init``.
    """

    def __init__(self, project: str, *, run_dir: str | Path | None = None, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._run: Any = None

    def on_run_start(self, run: RunRecord) -> None:
        """Begin, or go on with the run of before."""
        if self._run is None:
            module = _optional("wandb", extra="wandb")
            self._run = module.init(
                project=self.project, id=self._id(), resume="allow", **self.options
            )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def on_run_end(self, end: RunEnd) -> None:
        """Say how it ended."""
        if self._run is not None:
            summary = {"goodput_tokens_per_s": end.goodput_tokens_per_s, "plt": end.plt}
            self._run.summary.update(summary)
            self._run.finish()
            self._run = None

    def _id(self) -> str:
        if self._run_dir is None:
            return uuid.uuid4().hex
        place = self._run_dir / "wandb-id"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(uuid.uuid4().hex)
        return place.read_text().strip()


def configured(config: TrainConfig, *, run_dir: str | Path) -> list[Callback]:
    """The callbacks that ``[metrics]`` asks for.

    Raises:
        ConfigError: A package that one of them needs is not installed.
    """
    wanted: list[Callback] = []
    problems = []
    if config.metrics.tensorboard:
        problems += _missing("tensorboard", key="metrics.tensorboard")
        wanted.append(TensorBoard(Path(run_dir) / "tensorboard"))
    if config.metrics.wandb_project is not None:
        problems += _missing("wandb", key="metrics.wandb_project")
        wanted.append(WandB(config.metrics.wandb_project, run_dir=run_dir))
    if problems:
        raise ConfigError(problems)
    return wanted


def _missing(package: str, *, key: str) -> list[Problem]:
    if importlib.util.find_spec(package) is not None:
        return []
    text = f"{key} needs the package {package}: pip install 'lazarus-moe[{package}]'"
    return [Problem(text, key=key)]


def _optional(name: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is missing: pip install 'lazarus-moe[{extra}]'") from error

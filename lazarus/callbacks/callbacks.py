"""The base class ``Callback`` and the built-in callbacks.

Callbacks run in the driver after an event was recorded and do not block training. They need not be
picklable. If a callback raises, it is disabled with a warning; with
``metrics.on_callback_error = "fail"`` the run ends as well. Optional packages are imported when a
run starts.
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
    """Base class for callbacks: override the methods for the events of interest.

    Methods are called in the driver, one event after the other. Each receives a record of the event
    (see ``lazarus.record.typed``).
    """

    def on_event(self, event: Event) -> None:
        """Called with every event of the record, as a mapping; dispatches to the methods below."""
        hand_on = _METHODS.get(event["event"])
        if hand_on is not None:
            hand_on(self, event)

    def on_run_start(self, run: RunRecord) -> None:
        """Called when a run starts or is resumed."""

    def on_step(self, step: StepRecord) -> None:
        """Called when a step is committed."""

    def on_eval(self, evaluation: EvalRecord) -> None:
        """Called when an evaluation has finished."""

    def on_reconfigured(self, change: Reconfiguration) -> None:
        """Called when training goes on after a change of nodes or plan."""

    def on_expert_restored(self, expert: RestoredExpert) -> None:
        """Called when a lost expert was restored from a copy that may be older than the step."""

    def on_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Called when a checkpoint has been written to storage."""

    def on_run_end(self, end: RunEnd) -> None:
        """Called when the run has ended."""


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
    """Appends every event to a file as one line of JSON, flushed at once.

    Use this callback to have another program follow the run.

    Args:
        path: The file; missing folders are created.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def on_event(self, event: Event) -> None:
        """Append the event to the file."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(dict(event)) + "\n")
        self._file.flush()
        if event["event"] == "run_finished":
            self._file.close()
            self._file = None


class _Scalars(Callback):
    """Base of callbacks that log named numbers per step, such as TensorBoard and W&B."""

    def __init__(self) -> None:
        self._step = 0

    def on_step(self, step: StepRecord) -> None:
        """Log loss, speed, number of nodes, and every other number in the record."""
        self._step = step.step
        values = {"loss": step.loss, "num_nodes": float(step.num_nodes), "wall_s": step.wall_s}
        if step.wall_s > 0:
            values["tokens_per_s"] = step.tokens / step.wall_s
        for name, value in step.more.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values[name] = float(value)
        self.write({f"train/{k}": v for k, v in values.items() if math.isfinite(v)}, step.step)

    def on_eval(self, evaluation: EvalRecord) -> None:
        """Log the evaluation loss."""
        if math.isfinite(evaluation.loss):
            self.write({"eval/loss": evaluation.loss}, evaluation.step)

    def on_reconfigured(self, change: Reconfiguration) -> None:
        """Log the duration by phase and the bytes moved."""
        values = {f"reconfiguration/{k}_s": v for k, v in change.phases.items()}
        values |= {
            "reconfiguration/wall_s": change.wall_s,
            "reconfiguration/bytes_moved": float(change.bytes_moved),
        }
        self.write(values, self._step)

    def on_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Log size and duration."""
        values = {
            "checkpoint/bytes": float(checkpoint.bytes),
            "checkpoint/wall_s": checkpoint.wall_s,
        }
        self.write(values, checkpoint.step)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name for a step; subclasses implement this."""
        raise NotImplementedError


class TensorBoard(_Scalars):
    """Writes TensorBoard event files to ``log_dir``. Needs the package tensorboard."""

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
    """Logs to Weights & Biases. Needs the package wandb.

    Args:
        project: The W&B project.
        run_dir: Folder in which the W&B run id is kept, so that a resumed run continues the same
            W&B run. None: every start is a new W&B run.
        options: Further arguments of ``wandb.init``.
    """

    def __init__(self, project: str, *, run_dir: str | Path | None = None, **options: Any) -> None:
        super().__init__()
        self.project, self.options = project, options
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._run: Any = None

    def on_run_start(self, run: RunRecord) -> None:
        """Start the W&B run, or resume the previous one."""
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
        """Write goodput and PLT to the summary, and finish the W&B run."""
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
    """Create the callbacks that the section ``[metrics]`` of the configuration asks for.

    Args:
        config: The configuration.
        run_dir: The run's folder.

    Raises:
        ConfigError: A required package is not installed.
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

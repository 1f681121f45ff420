"""What callbacks are told, as frozen records made from events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run, or another life of it, begins."""

    num_nodes: int
    world_size: int
    start_step: int  # the last step that was committed before; 0 for a fresh run
    steps: int  # wanted in all; 0 if the record does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One committed step."""

    step: int
    loss: float  # NaN where it was not a finite number
    tokens: int
    num_nodes: int
    wall_s: float
    more: Mapping[str, Any] = field(default_factory=dict)  # lr, grad_norm, what users log


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """Held-out loss after a step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconfiguration:
    """Members or plan changed. Times in seconds."""

    generation: int
    reason: str
    wall_s: float
    phases: Mapping[str, float]
    num_nodes: int
    moves: int
    bytes_moved: int
    lost: tuple[int, ...]
    joined: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredExpert:
    """An expert that had no live replica left."""

    layer: int
    expert: int
    source: str
    behind_steps: int
    lost_copies: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A checkpoint is durable."""

    step: int
    bytes: int
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """The run is over, or ended short."""

    status: str
    steps: int
    wall_s: float
    goodput_tokens_per_s: float
    ettr: float
    plt: float
    state_digest: str


_STEP_FIELDS = frozenset(
    {"t", "m", "event", "generation", "step", "loss", "tokens", "num_nodes", "wall_s"}
)


def run_record(event: Event) -> RunRecord:
    """From ``run_started``."""
    return RunRecord(
        num_nodes=int(event["num_nodes"]),
        world_size=int(event["world_size"]),
        start_step=int(event.get("start_step", 0)),
        steps=int(event.get("steps", 0)),
    )


def step_record(event: Event) -> StepRecord:
    """From ``step_committed``."""
    return StepRecord(
        step=int(event["step"]),
        loss=_number(event["loss"]),
        tokens=int(event["tokens"]),
        num_nodes=int(event["num_nodes"]),
        wall_s=float(event["wall_s"]),
        more={name: value for name, value in event.items() if name not in _STEP_FIELDS},
    )


def eval_record(event: Event) -> EvalRecord:
    """From ``evaluated``."""
    return EvalRecord(step=int(event["step"]), loss=_number(event["loss"]))


def reconfiguration(event: Event) -> Reconfiguration:
    """From ``reconfigured``."""
    return Reconfiguration(
        generation=int(event["generation"]),
        reason=str(event["reason"]),
        wall_s=float(event["wall_s"]),
        phases={str(k): float(v) for k, v in event["phases"].items()},
        num_nodes=int(event["num_nodes"]),
        moves=int(event["moves"]),
        bytes_moved=int(event["bytes_moved"]),
        lost=tuple(event.get("lost", ())),
        joined=tuple(event.get("joined", ())),
    )


def restored_expert(event: Event) -> RestoredExpert:
    """From ``expert_restored``."""
    return RestoredExpert(
        layer=int(event["layer"]),
        expert=int(event["expert"]),
        source=str(event["source"]),
        behind_steps=int(event["behind_steps"]),
        lost_copies=float(event["lost_copies"]),
    )


def checkpoint_record(event: Event) -> CheckpointRecord:
    """From ``checkpoint_persisted``."""
    return CheckpointRecord(
        step=int(event["step"]), bytes=int(event["bytes"]), wall_s=float(event["wall_s"])
    )


def run_end(event: Event) -> RunEnd:
    """From ``run_finished``."""
    return RunEnd(
        status=str(event.get("status", "finished")),
        steps=int(event["steps"]),
        wall_s=float(event["wall_s"]),
        goodput_tokens_per_s=float(event.get("goodput_tokens_per_s", 0.0)),
        ettr=float(event.get("ettr", 0.0)),
        plt=float(event.get("plt", 0.0)),
        state_digest=str(event.get("state_digest", "")),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)

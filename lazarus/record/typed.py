"""Frozen dataclasses of events, as callbacks receive them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run has started or resumed."""

    num_nodes: int
    world_size: int
    start_step: int  # the last step that was committed before; 0 for a fresh run
    steps: int  # train.steps; 0 if the record does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One committed step."""

    step: int
    loss: float  # NaN if the loss was not finite
    tokens: int
    num_nodes: int
    wall_s: float
    more: Mapping[str, Any] = field(default_factory=dict)  # lr, grad_norm, the user's values


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """The held-out loss after a step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconfiguration:
    """A reconfiguration: the nodes or the plan changed. Times in seconds.

    ``lost`` and ``joined`` are node numbers, ``moves`` counts moved experts.
    """

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
    """An expert without a live replica was restored from ``source``.

    ``behind_steps`` is the age of the restored copy in steps, ``lost_copies`` the number of routed
    copies that the expert lost.
    """

    layer: int
    expert: int
    source: str
    behind_steps: int
    lost_copies: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A checkpoint has become durable on storage."""

    step: int
    bytes: int
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """The run has ended; ``status`` is "finished", "stopped", "short" or "failed"."""

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
    """Convert a ``run_started`` event."""
    return RunRecord(
        num_nodes=int(event["num_nodes"]),
        world_size=int(event["world_size"]),
        start_step=int(event.get("start_step", 0)),
        steps=int(event.get("steps", 0)),
    )


def step_record(event: Event) -> StepRecord:
    """Convert a ``step_committed`` event."""
    return StepRecord(
        step=int(event["step"]),
        loss=_number(event["loss"]),
        tokens=int(event["tokens"]),
        num_nodes=int(event["num_nodes"]),
        wall_s=float(event["wall_s"]),
        more={name: value for name, value in event.items() if name not in _STEP_FIELDS},
    )


def eval_record(event: Event) -> EvalRecord:
    """Convert an ``evaluated`` event."""
    return EvalRecord(step=int(event["step"]), loss=_number(event["loss"]))


def reconfiguration(event: Event) -> Reconfiguration:
    """Convert a ``reconfigured`` event."""
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
    """Convert an ``expert_restored`` event."""
    return RestoredExpert(
        layer=int(event["layer"]),
        expert=int(event["expert"]),
        source=str(event["source"]),
        behind_steps=int(event["behind_steps"]),
        lost_copies=float(event["lost_copies"]),
    )


def checkpoint_record(event: Event) -> CheckpointRecord:
    """Convert a ``checkpoint_persisted`` event."""
    return CheckpointRecord(
        step=int(event["step"]), bytes=int(event["bytes"]), wall_s=float(event["wall_s"])
    )


def run_end(event: Event) -> RunEnd:
    """Convert a ``run_finished`` event."""
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

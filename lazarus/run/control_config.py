"""Derive the controller's settings from a run's configuration; every field is set explicitly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lazarus.checkpoint.restoring.policy import RecoveryPolicy
from lazarus.checkpoint.selection.adaptive import SaveSettings
from lazarus.config import layers
from lazarus.config.train_config import TrainConfig
from lazarus.control.cluster.state import ControlConfig
from lazarus.policy.checked import CheckedPlacement, CheckedRecovery
from lazarus.policy.named import PLACEMENTS, RECOVERIES, check_call, imported_policy
from lazarus.run.resume_point import ResumePoint
from lazarus.version import __version__
from placement import PlacementPolicy, Plan, replan

# Fields of ``ControlConfig`` that are copied unchanged -> the key of the configuration.
KEYS: Mapping[str, str] = {
    "steps": "train.steps",
    "global_batch": "train.global_batch",
    "seed": "run.seed",
    "ledger": "run.ledger",
    "nodes": "cluster.nodes",
    "min_nodes": "cluster.min_nodes",
    "max_nodes": "cluster.max_nodes",
    "join_debounce_s": "cluster.join_debounce_s",
    "quorum_timeout_s": "cluster.quorum_timeout_s",
    "min_replicas": "placement.min_replicas",
    "spare_losses": "placement.spare_losses",
    "memory_fraction": "placement.memory_fraction",
    "resilience_weight": "placement.resilience_weight",
    "solver": "placement.solver",
    "on_lost_expert": "recovery.on_lost_expert",
    "on_mismatch": "recovery.on_mismatch",
    "heal": "recovery.heal",
    "final_checkpoint": "checkpoint.full_at_end",
    "plt_budget": "checkpoint.plt_budget",
}
# Fields set only for a resumed run; a new run has the defaults of ``ControlConfig``.
_OF_A_START = (
    "resume",
    "start_step",
    "start_generation",
    "start_lineage",
    "start_plt",
    "start_plt_spent",
    "checkpoints",
    "stored",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """The run's placement policy, and the user's recovery policy if there is one."""

    placement: PlacementPolicy
    recovery: CheckedRecovery | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ThisRun:
    """Settings of the controller that are not part of the configuration.

    ``start`` is the checkpoint to resume from; None for a new run.
    """

    run_id: str
    run_dir: Path
    checkpoint_url: str
    ranks_per_node: int
    faults: tuple[str, ...]
    start: ResumePoint | None


def policies_of(
    config: TrainConfig, *, placement: PlacementPolicy | None, recovery: RecoveryPolicy | None
) -> Policies:
    """The policies of a run.

    Args:
        config: The run's configuration.
        placement: The user's placement policy; None: ``placement.policy`` of the configuration,
            else the built-in policy.
        recovery: The user's recovery policy; None: ``recovery.policy`` of the configuration, else
            none.

    Raises:
        ConfigError: A policy cannot be imported, or cannot be called like its protocol.
    """
    return Policies(
        placement=_placement(config, placement),
        recovery=_recovery(config, recovery),
    )


def keeps_checkpoints(config: TrainConfig) -> bool:
    """Whether the run writes checkpoints to storage."""
    return config.checkpoint.every != 0 or config.checkpoint.full_at_end


def control_config(config: TrainConfig, *, policies: Policies, run: ThisRun) -> ControlConfig:
    """Make the controller's settings, with a value for every field of ``ControlConfig``.

    Raises:
        TypeError: This function sets no value for a field of ``ControlConfig``.
    """
    slots = config.placement.slots_per_node
    given: dict[str, Any] = {name: layers.value_of(config, key) for name, key in KEYS.items()}
    given |= {
        "timeouts": config.timeouts,
        "slots_per_node": None if slots == "auto" else int(slots),
        "partial_checkpoints": config.checkpoint.select != "full",
        "saves": _save_settings(config),
        "plan_limit_s": _limit_s(config),
        "plans_by_zone": config.placement.domains == "zone",
        "probes_place": keeps_checkpoints(config),
        "placement": policies.placement,
        "recovery": policies.recovery,
        "plan_text": Plan.to_json,
        "version": __version__,
        "run_id": run.run_id,
        "ranks_per_node": run.ranks_per_node,
        "faults": run.faults,
        "checkpoint_url": run.checkpoint_url,
        "rescue_url": str(run.run_dir / "rescue"),
    }
    given |= _of_a_start(run.start)
    left_out = [f.name for f in fields(ControlConfig) if f.name not in given]
    if left_out:
        raise TypeError(f"nothing says what the controller's {', '.join(left_out)} is")
    return ControlConfig(**given)


def _of_a_start(start: ResumePoint | None) -> Mapping[str, Any]:
    if start is not None:
        return start.control()
    specs = {f.name: f for f in fields(ControlConfig)}
    return {name: layers.default_of(specs[name]) for name in _OF_A_START}


def _limit_s(config: TrainConfig) -> float:
    return config.placement.max_plan_ms / 1000


def _placement(config: TrainConfig, policy: PlacementPolicy | None) -> PlacementPolicy:
    path = config.placement.policy
    if policy is None and path is not None:
        policy = imported_policy(
            path, key="placement.policy", group=PLACEMENTS, like=PlacementPolicy
        )
    elif policy is not None:
        check_call(policy, what="placement", like=PlacementPolicy)
    return replan if policy is None else CheckedPlacement(policy, limit_s=_limit_s(config))


def _recovery(config: TrainConfig, policy: RecoveryPolicy | None) -> CheckedRecovery | None:
    path = config.recovery.policy
    if policy is None and path is not None:
        policy = imported_policy(path, key="recovery.policy", group=RECOVERIES, like=RecoveryPolicy)
    elif policy is not None:
        check_call(policy, what="recovery", like=RecoveryPolicy)
    if policy is None:
        return None
    on_lost_expert = config.recovery.on_lost_expert
    return CheckedRecovery(policy, limit_s=_limit_s(config), on_lost_expert=on_lost_expert)


def _save_settings(config: TrainConfig) -> SaveSettings:
    asked = config.checkpoint
    return SaveSettings(
        every=None if asked.every == "auto" else int(asked.every),
        k_snapshot=None if asked.k_snapshot == "auto" else int(asked.k_snapshot),
        k_persist=None if asked.k_persist == "auto" else int(asked.k_persist),
        select=asked.select,
    )

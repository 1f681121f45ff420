"""What the controller is told of a run's configuration."""

from __future__ import annotations

from lazarus.checkpoint.adaptive import SaveSettings
from lazarus.checkpoint.policy import RecoveryPolicy
from lazarus.config import TrainConfig
from lazarus.control.state import ControlConfig
from lazarus.policies import CheckedPlacement, CheckedRecovery
from lazarus.policy_paths import PLACEMENTS, RECOVERIES, check_call, imported_policy
from lazarus.timeouts import derive_timeouts
from lazarus.version import __version__
from placement import PlacementPolicy, replan


def control_config(
    config: TrainConfig,
    *,
    placement: PlacementPolicy | None,
    recovery: RecoveryPolicy | None,
    ranks_per_node: int,
) -> ControlConfig:
    """The controller's settings.

    Args:
        config: Of the run.
        placement: The user's policy as an object; None: the one that the configuration names, if
            any, else the library's.
        recovery: The same for experts without a live replica.
        ranks_per_node: Processes of each node.

    Raises:
        ConfigError: A policy cannot be imported, or not be called as its protocol is.
    """
    slots = config.placement.slots_per_node
    timeouts = derive_timeouts(config.recovery.tolerated_stall_s)
    return ControlConfig(
        steps=config.train.steps,
        global_batch=config.train.global_batch,
        seed=config.run.seed,
        ledger=config.run.ledger,
        nodes=config.cluster.nodes,
        min_nodes=config.cluster.min_nodes,
        max_nodes=config.cluster.max_nodes,
        ranks_per_node=ranks_per_node,
        min_replicas=config.placement.min_replicas,
        slots_per_node=None if slots == "auto" else int(slots),
        spare_losses=config.placement.spare_losses,
        tolerated_stall_s=config.recovery.tolerated_stall_s,
        start_timeout_s=timeouts.startup_s,
        standstill_s=timeouts.standstill_s,
        join_debounce_s=config.cluster.join_debounce_s,
        quorum_timeout_s=config.cluster.quorum_timeout_s,
        final_checkpoint=config.checkpoint.full_at_end,
        on_lost_expert=config.recovery.on_lost_expert,
        on_mismatch=config.recovery.on_mismatch,
        partial_checkpoints=config.checkpoint.select != "full",
        saves=_save_settings(config),
        plt_budget=config.checkpoint.plt_budget,
        resilience_weight=config.placement.resilience_weight,
        solver=config.placement.solver,
        plan_limit_s=_limit_s(config),
        plans_by_zone=config.placement.domains == "zone",
        memory_fraction=config.placement.memory_fraction,
        heal=config.recovery.heal,
        version=__version__,
        placement=_placement(config, placement),
        recovery=_recovery(config, recovery),
    )


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

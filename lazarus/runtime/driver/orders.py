"""What the driver hands to each process of a run, and the limits by which it starts nodes."""

from __future__ import annotations

from lazarus.control.cluster.replacing import Limits
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.local_nodes import NodePlace
from lazarus.runtime.spec import ControllerSpec, RunSpec, WorkerSpec


def controller_spec(spec: RunSpec, *, host: str, bind_host: str) -> ControllerSpec:
    """Return what the controller is started with.

    Args:
        spec: The run.
        host: Address at which other processes reach the controller.
        bind_host: Address that the controller listens on.
    """
    return ControllerSpec(
        config=spec.control,
        host=host,
        port=0,
        bind_host=bind_host,
        credentials=spec.credentials,
        run_dir=spec.run_dir,
        decisive=spec.decisive,
        lives=spec.lives,
        keep_checkpoints=spec.config.checkpoint.keep,
        journal=spec.journal,
    )


def keeper_config(spec: RunSpec) -> KeeperConfig | None:
    """Return what a node's keeper is started with; None if the run saves nothing."""
    if spec.config.checkpoint.every == 0:
        return None
    return KeeperConfig(
        job=spec.control.run_id,
        credentials=spec.credentials,
        silent_s=spec.config.timeouts.keeper_silent_s,
    )


def worker_specs(spec: RunSpec, key: str, place: NodePlace, *, controller: str) -> list[WorkerSpec]:
    """Return what the ranks of one node are started with.

    Args:
        spec: The run.
        key: Name of the node.
        place: Where the node runs.
        controller: The controller's address.
    """
    control = spec.control
    return [
        WorkerSpec(
            run_id=control.run_id,
            worker=f"{key}.{local_rank}",
            node_key=key,
            local_rank=local_rank,
            ranks_per_node=control.ranks_per_node,
            host=place.host,
            controller=controller,
            credentials=spec.credentials,
            config=spec.config,
            user=spec.user,
            node_folder=spec.scratch / key,
            faults=control.faults,
            resume=spec.resume,
            keeper=place.keeper,
            zone=place.zone,
            memory_share=place.memory_share,
            checkpoint_url=control.checkpoint_url,
        )
        for local_rank in range(control.ranks_per_node)
    ]


def limits_of(spec: RunSpec, *, is_fixed: bool) -> Limits:
    """Return the limits by which nodes are started and replaced.

    Args:
        spec: The run.
        is_fixed: Whether the launcher's machines never change.
    """
    cluster, timeouts = spec.config.cluster, spec.config.timeouts
    return Limits(
        wanted=cluster.nodes,
        most=cluster.max_nodes,
        replaces=cluster.replace_lost,
        is_fixed=is_fixed,
        rest_s=timeouts.machine_rest_s,
        settled_s=timeouts.node_settled_s,
        start_s=timeouts.startup_s,
        salt=spec.control.run_id,
    )

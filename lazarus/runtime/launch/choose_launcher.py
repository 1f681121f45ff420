"""Which launcher a run gets, from its configuration. Imports Ray only where it is used."""

from __future__ import annotations

import os
import sys

from lazarus.config.train_config import TrainConfig
from lazarus.runtime.launch.launcher import LOOPBACK, Launcher, OnExit, ProcessLauncher, hosts_of
from lazarus.runtime.launch.ray_home import PrivateHome


def launcher_of(config: TrainConfig, on_exit: OnExit) -> Launcher:
    """Plain processes, Ray actors on an embedded cluster, or on one to join."""
    if config.cluster.launcher != "ray":
        host, bind_host = own_hosts(config)
        return ProcessLauncher(
            on_exit,
            host=host,
            bind_host=bind_host,
            nodes=config.cluster.nodes,
            is_warm=config.cluster.launcher == "process",
        )
    home = None if joins_cluster(config) else PrivateHome()
    from lazarus.runtime.launch.ray_launcher import RayLauncher

    try:
        return RayLauncher(on_exit, config, home=home)
    except BaseException:
        if home is not None:
            home.close()
        raise


def own_hosts(config: TrainConfig) -> tuple[str, str]:
    """Where processes on this machine alone are reached, and what they listen on."""
    return hosts_of(config.security.bind, own=LOOPBACK)


def joins_cluster(config: TrainConfig) -> bool:
    """Whether the run's nodes are machines of a Ray cluster that runs already."""
    if config.cluster.launcher != "ray":
        return False
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return bool(address) or _ray_is_up()


def _ray_is_up() -> bool:
    """Whether the user's own code has connected this process to a Ray cluster."""
    module = sys.modules.get("ray")
    return module is not None and bool(module.is_initialized())

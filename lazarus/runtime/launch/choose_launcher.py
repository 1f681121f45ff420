"""Chooses the launcher of a run from its configuration. Imports Ray only if the run uses it."""

from __future__ import annotations

import os
import socket
import sys

from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError
from lazarus.runtime.launch.launcher import LOOPBACK, Launcher, OnExit, ProcessLauncher, hosts_of
from lazarus.runtime.launch.ray_home import PrivateHome


def launcher_of(config: TrainConfig, on_exit: OnExit) -> Launcher:
    """Create the run's launcher: plain processes, or Ray on an embedded or a joined cluster.

    Raises:
        ConfigError: The Ray cluster to join does not answer, or nothing on this machine can listen
            on ``security.bind``.
    """
    require_own_address(config.security.bind)
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
    """Addresses for a run on this machine alone: to connect to, and to listen on."""
    return hosts_of(config.security.bind, own=LOOPBACK)


def require_own_address(bind: str) -> None:
    """Check that this machine, where the controller runs, has the address ``security.bind``.

    Raises:
        ConfigError: Nothing can listen there.
    """
    if bind == "auto":
        return
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bind, 0))
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"security.bind = {bind!r}: nothing on this machine can listen there: {error}; "
            'set it to an address of this machine, or to "auto"'
        ) from error


def joins_cluster(config: TrainConfig) -> bool:
    """Whether the run joins a Ray cluster that is already running."""
    if config.cluster.launcher != "ray":
        return False
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return bool(address) or _ray_is_up()


def _ray_is_up() -> bool:
    """Whether this process is connected to a Ray cluster already, by the user's code."""
    module = sys.modules.get("ray")
    return module is not None and bool(module.is_initialized())

"""The Ray cluster of a run, a private one or one to join; and what it tells of its machines."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray._private import ray_constants
from ray._private import state as ray_state

from lazarus.errors import ConfigError
from lazarus.runtime.launch.ray_home import PrivateHome
from lazarus.runtime.launch.ray_nodes import RayNode

_STORE_BYTES = 80 << 20  # Ray's object store: tensors never go through it
_PROBE_S = 1.0  # for a raylet to take a connection
_KNOCK_S = 5.0  # for a cluster's head to take a connection
_STATE: Any = ray_state  # has no types
LOOPBACK = "127.0.0.1"


class Cluster(Protocol):
    """What a launcher needs of Ray, beyond actors."""

    is_own: bool  # nobody else uses it, no node comes or goes by itself
    host: str  # address of the driver's machine

    def close(self) -> None: ...


class EmbeddedRay:
    """A private Ray on this machine: own folder, own token, loopback only, ended with the run."""

    is_own = True

    def __init__(self, home: PrivateHome, *, num_cpus: float) -> None:
        self._home = home
        self.host = LOOPBACK
        _mute_error_listener()
        try:
            with _loopback_only():
                self._init(num_cpus)
        except BaseException:
            self.close()
            raise

    def _init(self, num_cpus: float) -> None:
        ray.init(
            num_cpus=max(1, int(num_cpus + 1)),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=self._home.ray_folder,
            _node_ip_address=LOOPBACK,
        )

    def close(self) -> None:
        ray.shutdown()
        self._home.close()


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray take 127.0.0.1 for this node's address, which it then binds everything to.

    Ray replaces a loopback address by one that others can reach, and listens on all interfaces,
    unless it is told that there are no others. Its own processes are told by the environment.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


class JoinedRay:
    """A running cluster, which outlives the run."""

    is_own = False

    def __init__(self, address: str | None) -> None:
        """Connect, unless the user's own code has.

        Raises:
            ConfigError: Nothing answers at the address.
        """
        self._connected = not ray.is_initialized()
        _mute_error_listener()
        if self._connected:
            _connect(address)
        here = ray.get_runtime_context().get_node_id()
        self.host = next(str(n["NodeManagerAddress"]) for n in _nodes() if n["NodeID"] == here)

    def close(self) -> None:
        if self._connected:
            ray.shutdown()


def _connect(address: str | None) -> None:
    if address is not None and "://" in address:
        raise ConfigError(
            f"cluster.address={address} is not the address of a cluster's head; use HOST:PORT from "
            f"one of its machines, or submit the run with `ray job submit`"
        )
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        try:  # Ray itself would go on trying for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
        except OSError as problem:
            reason = problem.strerror or "no answer"
            raise ConfigError(f"cluster.address={address}: no Ray head there: {reason}") from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ConfigError(f"cluster.address={address}: no Ray cluster there: {reason}") from problem


def _mute_error_listener() -> None:
    """Ray prints killed workers on stdout, whatever ``log_to_driver`` says; our record has them."""
    module = ray._private.worker
    if hasattr(module, "listen_error_messages"):
        module.listen_error_messages = lambda *_: None


def _nodes() -> list[dict[str, Any]]:
    untyped: Any = ray.nodes
    found: list[dict[str, Any]] = untyped()
    return found


def live_nodes() -> list[RayNode]:
    """The live machines, with what is free on each now."""
    free = _STATE.available_resources_per_node()
    return [
        RayNode(
            id=str(node["NodeID"]),
            host=str(node["NodeManagerAddress"]),
            free=dict(free.get(node["NodeID"], {})),
            labels=dict(node.get("Labels") or {}),
            port=int(node.get("NodeManagerPort") or 0),
        )
        for node in _nodes()
        if node["Alive"]
    ]


def total_gpus() -> float:
    """The most GPUs that any live machine has, whether they are free or not."""
    totals = (node.get("Resources", {}) for node in _nodes() if node["Alive"])
    return max((float(total.get("GPU", 0.0)) for total in totals), default=0.0)


def answering(nodes: Sequence[RayNode]) -> tuple[RayNode, ...]:
    """Those whose raylet takes connections: the cluster calls a dead one alive for 15 s more."""
    if not nodes:
        return ()
    with ThreadPoolExecutor(max_workers=min(32, len(nodes))) as pool:
        return tuple(node for node, up in zip(nodes, pool.map(_answers, nodes), strict=True) if up)


def _answers(node: RayNode) -> bool:
    try:
        socket.create_connection((node.host, node.port), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def draining_nodes() -> dict[str, float]:
    """Ray node id -> seconds until it goes, 0 where nobody knows.

    Ray names the time of day at which a machine will go, so the wall clock is asked here.
    """
    now_ms = time.time() * 1000
    return {
        str(node): max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else 0.0
        for node, deadline_ms in _STATE.state.get_draining_nodes().items()
    }

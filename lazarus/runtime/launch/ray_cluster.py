"""Connects to a run's Ray cluster, private or joined, and reads the state of its machines."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import state as ray_state

from lazarus.errors import ConfigError
from lazarus.runtime.launch.ray_home import PrivateHome
from lazarus.runtime.launch.ray_nodes import RayNode

_STORE_BYTES = 80 << 20  # Ray's object store is small: tensors never go through it
_PROBE_S = 1.0  # for a raylet to accept a connection
_KNOCK_S = 5.0  # for a cluster's head to accept a connection
_STATE: Any = ray_state  # untyped
LOOPBACK = "127.0.0.1"


class EmbeddedRay:
    """A private Ray on this machine that ends with the run.

    It has a folder and a token of its own and listens on the loopback interface only.
    """

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
    """Make Ray accept 127.0.0.1 as this node's address and bind to nothing else.

    Ray normally replaces a loopback address by one that other machines can reach and listens on
    all interfaces. This constant turns that off in this process; Ray's other processes read the
    environment variable that ``PrivateHome`` sets.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


class JoinedRay:
    """A connection to a running cluster, which outlives the run."""

    is_own = False

    def __init__(self, address: str | None) -> None:
        """Connect, unless this process is connected to a cluster already.

        Args:
            address: "HOST:PORT" or another address that ``ray.init`` accepts; None: Ray's default.

        Raises:
            ConfigError: No Ray cluster answers at the address.
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
        try:  # ray.init would retry for many minutes
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
    """Stop Ray from printing killed workers on stdout, which it does despite ``log_to_driver``.

    The run's record lists these deaths.
    """
    module = ray._private.worker
    if hasattr(module, "listen_error_messages"):
        module.listen_error_messages = lambda *_: None


def _nodes() -> list[dict[str, Any]]:
    untyped: Any = ray.nodes
    found: list[dict[str, Any]] = untyped()
    return found


def live_nodes() -> list[RayNode]:
    """The live machines of the cluster, with their free resources."""
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
    """The largest number of GPUs of any live machine, free or not."""
    totals = (node.get("Resources", {}) for node in _nodes() if node["Alive"])
    return max((float(total.get("GPU", 0.0)) for total in totals), default=0.0)


def answering(nodes: Sequence[RayNode]) -> tuple[RayNode, ...]:
    """The nodes whose raylet accepts connections; Ray lists a dead node as alive for 15 s."""
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
    """Map each draining Ray node's id to the seconds until it goes; 0: unknown.

    Ray gives the deadline as a time of day, so this function reads the wall clock.
    """
    now_ms = time.time() * 1000
    return {
        str(node): max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else 0.0
        for node, deadline_ms in _STATE.state.get_draining_nodes().items()
    }

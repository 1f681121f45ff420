"""The run's processes as Ray actors, owned by the driver: embedded Ray, or a cluster to join.

Ray kills actors with their owner, so the driver creates them all: were the controller the owner,
its death would take every worker along. On a cluster to join, the machines that come and go are
watched: who comes becomes a node of the run without being asked, who is drained is told of.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lazarus.config import TrainConfig
from lazarus.errors import ConfigError, StartupError
from lazarus.runtime.keeper import KeeperConfig
from lazarus.runtime.launch import OnExit, OnNotice
from lazarus.runtime.local_nodes import LocalNodes, NodePlace
from lazarus.runtime.ray_actors import ControllerActor, NodeActor, WorkerActor
from lazarus.runtime.ray_cluster import EmbeddedRay, JoinedRay, draining_nodes, live_nodes
from lazarus.runtime.ray_home import PrivateHome
from lazarus.runtime.ray_nodes import Places, RayNode, parse_bytes
from lazarus.runtime.spec import ControllerSpec, WorkerSpec

_POLL_S = 0.5  # between two looks at the cluster's machines
_JOIN_S = 5.0
_ZONE_LABEL = "ray.io/availability-zone"
_ACTOR_S = 120.0  # for Ray to start a small actor on a busy machine


@dataclass(frozen=True, slots=True)
class _Running:
    actor: Any
    life: Any  # reference that resolves when the process's work ends


class RayLauncher:
    """Starts one actor per rank, one for the controller, and one per node of a joined cluster."""

    def __init__(
        self, on_exit: OnExit, config: TrainConfig, *, home: PrivateHome | None, host: str | None
    ) -> None:
        self._on_exit = on_exit
        self._config = config
        ranks = config.cluster.ranks_per_node
        self._ranks = 1 if ranks == "auto" else int(ranks)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._node_actors: dict[str, Any] = {}
        self._node_of: dict[str, RayNode] = {}
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._cluster = self._connect(home)
        self.host = host or self._cluster.host
        self._local = LocalNodes(self.host)
        memory = config.cluster.memory_per_rank
        self._per_rank = {
            "CPU": config.cluster.cpus_per_rank,
            "GPU": self._gpus(),
            "memory": 0.0 if memory is None else parse_bytes(memory),
        }
        self._places = Places(
            {name: self._ranks * amount for name, amount in self._per_rank.items()},
            labels={} if self._cluster.is_own else config.cluster.node_labels,
        )
        self._spawn("launcher", self._watch)

    def _connect(self, home: PrivateHome | None) -> EmbeddedRay | JoinedRay:
        cluster = self._config.cluster
        if home is None:
            return JoinedRay(cluster.address or os.environ.get("RAY_ADDRESS"))
        most = 4 * cluster.nodes + 16  # room for joiners
        return EmbeddedRay(home, num_cpus=most * self._ranks * cluster.cpus_per_rank)

    def _gpus(self) -> float:
        """One for each rank where machines have them; embedded ranks share what is there."""
        if self._cluster.is_own:
            return 0.0
        most = max((node.free.get("GPU", 0.0) for node in live_nodes()), default=0.0)
        return 1.0 if most >= self._ranks else 0.0

    def _spawn(self, name: str, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- nodes ---------------------------------------------------------------------------------

    def room(self, wanted: int) -> int:
        """How many of the wanted nodes can start now; an autoscaler is asked for the rest.

        Raises:
            ConfigError: Fewer fit, and no autoscaler adds machines.
        """
        if isinstance(self._cluster, JoinedRay):
            bundle = {name: self._ranks * x for name, x in self._per_rank.items() if x > 0}
            self._cluster.ask_for(wanted, bundle, self._config.cluster.node_labels)
        with self._lock:
            self._places.see(live_nodes())
            room = self._places.room()
            if room >= wanted:
                return wanted
            growing = isinstance(self._cluster, JoinedRay) and self._cluster.grows
            if not growing:
                raise ConfigError(self._places.shortage(wanted))
        return room

    def open_node(self, key: str, *, keeper: KeeperConfig | None, folder: Path) -> NodePlace:
        """Choose a machine and start what the node needs beside its ranks.

        Raises:
            StartupError: There is no room, or the machine did not answer.
        """
        with self._lock:
            node = self._places.place(key)
        if node is None:
            raise StartupError(f"no room for {key}: {self._places.shortage(1)}")
        self._node_of[key] = node
        if self._cluster.is_own:
            here = self._local.open(key, keeper=keeper, folder=folder)
            return replace(here, memory_share=1 / self._config.cluster.nodes)
        actor = _remote(NodeActor).options(num_cpus=0, **_on(node.id)).remote(node.host)
        with self._lock:
            self._node_actors[key] = actor
        try:
            place: NodePlace = ray.get(actor.open.remote(key, keeper, folder), timeout=_ACTOR_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as problem:
            self.close_node(key)
            raise StartupError(f"{key} did not start on {node.host}: {problem}") from problem
        return replace(
            place, zone=node.labels.get(_ZONE_LABEL, ""), memory_share=self._memory_share(node)
        )

    def _memory_share(self, node: RayNode) -> float:
        """Ranks with a device of their own see that one alone; others see the whole machine."""
        if self._per_rank["GPU"]:
            return float(self._ranks)
        with self._lock:
            return 1 / max(1, self._places.num_on(node.id))

    def close_node(self, key: str) -> None:
        """Forget the node, and end its keeper; fine if it is gone."""
        with self._lock:
            self._places.close(key)
            actor = self._node_actors.pop(key, None)
        if actor is not None:
            ray.kill(actor)
        self._local.close(key)

    def follow_nodes(self, on_room: Callable[[], None], on_notice: OnNotice) -> None:
        """From now on, tell of machines that come and of those that are drained."""
        if not self._cluster.is_own:
            self._spawn("ray-nodes", self._follow, on_room, on_notice)

    def _follow(self, on_room: Callable[[], None], on_notice: OnNotice) -> None:
        while not self._closing.wait(_POLL_S):
            going = draining_nodes()
            with self._lock:
                told = [(key, s) for id, s in going.items() for key in self._places.drain(id)]
                fresh = self._places.see(live_nodes())
            for key, notice_s in told:
                on_notice(key, notice_s)
            for _ in range(self._wanted(fresh)):
                on_room()

    def _wanted(self, fresh: tuple[str, ...]) -> int:
        """One node on each new machine; more where the run lacks some; never above the most."""
        cluster = self._config.cluster
        with self._lock:
            have = self._places.num_open
            room = sum(map(self._places.room_on, fresh))
        wanted = min(room, max(len(fresh), cluster.nodes - have))
        if cluster.max_nodes is not None:
            wanted = min(wanted, cluster.max_nodes - have)
        return max(0, wanted)

    # ---- processes -----------------------------------------------------------------------------

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        here = ray.get_runtime_context().get_node_id()
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 8}
        actor = _remote(ControllerActor).options(**options, **_on(here)).remote(spec)
        try:
            port = int(ray.get(actor.port.remote(), timeout=timeout_s))
        except ray.exceptions.GetTimeoutError:
            raise StartupError(f"the controller did not come up within {timeout_s:.0f} s") from None
        except ray.exceptions.RayActorError as problem:
            raise StartupError(f"the controller did not come up: {problem}") from None
        self._keep("controller", actor, actor.wait.remote())
        return port

    def start_worker(self, spec: WorkerSpec) -> None:
        options = {
            "num_cpus": self._per_rank["CPU"],
            "num_gpus": self._per_rank["GPU"],
            "max_restarts": 0,
            **_on(self._node_of[spec.node_key].id),
        }
        if self._per_rank["memory"]:
            options["memory"] = self._per_rank["memory"]
        actor = _remote(WorkerActor).options(**options).remote()
        self._keep(spec.worker, actor, actor.run.remote(spec))

    def _keep(self, name: str, actor: Any, life: Any) -> None:
        with self._lock:
            self._running[name] = _Running(actor, life)

    def _watch(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                lives = {running.life: name for name, running in self._running.items()}
            if not lives:
                self._closing.wait(0.05)
                continue
            done, _ = ray.wait(list(lives), num_returns=1, timeout=0.2, fetch_local=False)
            for life in done:
                self._ended(lives[life], life)

    def _ended(self, name: str, life: Any) -> None:
        with self._lock:
            running = self._running.pop(name, None)
        if running is None:
            return
        try:
            cause = f"actor ended with {ray.get(life)}"
        except ray.exceptions.RayTaskError as problem:
            own = problem.cause
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
            cause = f"{type(own).__name__}: {own}".splitlines()[0]
        except ray.exceptions.RayError as problem:
            cause = f"ray: {type(problem).__name__}"
        ray.kill(running.actor)
        if not self._closing.is_set():
            self._on_exit(name, cause)

    def kill(self, name: str) -> None:
        with self._lock:
            running = self._running.get(name)
        if running is not None:
            ray.kill(running.actor, no_restart=name != "controller")

    def close(self, *, grace_s: float) -> None:
        with self._lock:
            lives = [running.life for running in self._running.values()]
        if lives and grace_s > 0:
            ray.wait(lives, num_returns=len(lives), timeout=grace_s, fetch_local=False)
        self._closing.set()
        for thread in self._threads:
            thread.join(_JOIN_S)  # one may wait for a machine; its actor ends with us
        self._local.close_all()
        for running in self._running.values():
            ray.kill(running.actor)
        self._running.clear()
        for actor in self._node_actors.values():
            ray.kill(actor)
        self._node_actors.clear()
        self._cluster.close()


def _remote(cls: type) -> Any:
    """The actor class; Ray's own types do not know ``.remote``."""
    return ray.remote(cls)


def _on(node_id: str) -> dict[str, Any]:
    """Actor options: on this machine or nowhere."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}

"""Starts the run's processes as Ray actors, on an embedded Ray or on a cluster that it joins.

Ray kills actors together with their owner, so the driver creates all of them: if the controller
created the workers, its death would end them too.

On a joined cluster each node of the run has an actor that reserves all of the node's CPUs and
memory at once and ends with the driver's job. A placement group would not do: in Ray 2.60 a group
whose machine hangs blocks the creation of all other groups in the cluster, for good. The launcher
also watches the cluster's machines and reports new ones and those being drained.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lazarus.basics.clock import now_s
from lazarus.basics.threads import say_so, spawn
from lazarus.config.train_config import TrainConfig
from lazarus.control.cluster.replacing import Machine
from lazarus.errors import RoomTakenError, StartupError
from lazarus.runtime.host.memory import ranks_per_node
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.launcher import OnExit, OnNotice, hosts_of
from lazarus.runtime.launch.local_nodes import LocalNodes, NodePlace, OwnPlaces
from lazarus.runtime.launch.ray_actors import ControllerActor, NodeActor, WorkerActor
from lazarus.runtime.launch.ray_cluster import (
    EmbeddedRay,
    JoinedRay,
    answering,
    draining_nodes,
    live_nodes,
    total_gpus,
)
from lazarus.runtime.launch.ray_home import PrivateHome
from lazarus.runtime.launch.ray_nodes import Places, RayNode, parse_bytes
from lazarus.runtime.launch.ray_processes import RayProcesses
from lazarus.runtime.launch.ray_wishes import Wishes
from lazarus.runtime.spec import ControllerSpec, WorkerSpec

_POLL_S = 0.5  # between two polls of the cluster's machines
_JOIN_S = 5.0
_ZONE_LABEL = "ray.io/availability-zone"
_RESERVE_S = 5.0  # first wait for a node's actor to start; doubles each time it was too short
_SILENT_S = 20.0  # longest wait for a machine with room to start an actor, if there are others
_WISHES_EVERY = 10  # polls of the cluster's machines per refresh of the autoscaler's request


class RayLauncher:
    """Starts one actor per rank, one for the controller, and one per node of a joined cluster.

    Args:
        on_exit: Called when a process ends; with the name "launcher" if a watching thread dies.
        config: The run's configuration.
        home: Folder of an embedded Ray; None: join a running cluster.

    Raises:
        ConfigError: No Ray cluster answers at the address to join.
    """

    def __init__(self, on_exit: OnExit, config: TrainConfig, *, home: PrivateHome | None) -> None:
        self._on_exit = on_exit
        self._config = config
        self._ranks = ranks_per_node(config.cluster.ranks_per_node)
        self._reach_s = config.timeouts.actor_start_s
        self._lock = threading.Lock()
        self._node_actors: dict[str, Any] = {}
        self._warm: dict[str, list[Any]] = {}  # node key -> actors of ranks that are not started
        self._patience_s = _RESERVE_S
        self._closing = threading.Event()
        self._processes = RayProcesses(on_exit, closing=self._closing)
        self._threads: list[threading.Thread] = []
        self._cluster = self._connect(home)
        self.is_fixed = self._cluster.is_own
        bind = config.security.bind
        self.host, self.bind_host = hosts_of(bind, own=self._cluster.host)
        self._bind = bind if self.host != self.bind_host else "auto"  # for other machines
        self._local = LocalNodes(self.host, bind_host=self.bind_host)
        self._own = OwnPlaces(config.cluster.nodes)
        memory = config.cluster.memory_per_rank
        self._per_rank = {
            "CPU": config.cluster.cpus_per_rank,
            "GPU": self._gpus(),
            "memory": 0.0 if memory is None else parse_bytes(memory),
        }
        self._bundle = {n: self._ranks * amount for n, amount in self._per_rank.items() if amount}
        self._places = Places(self._bundle, labels=config.cluster.node_labels)
        self._wishes = None if self._cluster.is_own else Wishes(uuid.uuid4().hex[:8])
        self._spawn("launcher", self._processes.watch)

    def _connect(self, home: PrivateHome | None) -> EmbeddedRay | JoinedRay:
        cluster = self._config.cluster
        if home is None:
            return JoinedRay(cluster.address or os.environ.get("RAY_ADDRESS"))
        most = 4 * cluster.nodes + 16  # room for nodes that join later
        return EmbeddedRay(home, num_cpus=most * self._ranks * cluster.cpus_per_rank)

    def _gpus(self) -> float:
        """GPUs per rank: 1 if some machine has enough for a node's ranks, else 0.

        On an embedded Ray the ranks share the machine's GPUs, so none are reserved.
        """
        if self._cluster.is_own:
            return 0.0
        return 1.0 if total_gpus() >= self._ranks else 0.0

    def _spawn(self, name: str, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(spawn(name, target, *args, on_death=self._blind))

    def _blind(self, name: str, problem: BaseException) -> None:
        """Report the death of a watching thread: deaths or machines would go unnoticed."""
        say_so(name, problem)
        if not self._closing.is_set():
            self._on_exit("launcher", f"{name}: {type(problem).__name__}: {problem}")

    # ---- machines ------------------------------------------------------------------------------

    def machines(self) -> tuple[Machine, ...]:
        """Machines that have room and answer now; empty if the cluster's head does not answer."""
        if self._cluster.is_own:
            return self._own.machines()
        try:
            nodes = {node.id: node for node in live_nodes()}
        except ray.exceptions.RayError:
            return ()  # the cluster's head does not answer
        with self._lock:
            self._places.update(nodes.values())
            able = [machine for machine in self._places.machines() if machine.room]
        there = {node.id for node in answering([nodes[machine.id] for machine in able])}
        return tuple(machine for machine in able if machine.id in there)

    def name_of(self, machine: str) -> str:
        with self._lock:
            node = self._places.node(machine)
        return f"{machine} of {self.host}" if node is None else f"{node.host} ({machine[:8]})"

    def shortage(self) -> str:
        if self._cluster.is_own:
            return self._own.shortage()
        with self._lock:
            return self._places.shortage()

    def add_machine(self) -> None:
        if self._cluster.is_own:
            self._own.add()

    def follow_nodes(self, on_machines: Callable[[int], None], on_notice: OnNotice) -> None:
        """Begin to report new and draining machines of a joined cluster."""
        if self._wishes is None:
            return
        self._wishes.ask(self._config.cluster.nodes, self._bundle, self._config.cluster.node_labels)
        with self._lock:
            self._places.see(live_nodes())
        self._spawn("ray-nodes", self._follow, self._wishes, on_machines, on_notice)

    def _follow(
        self, wishes: Wishes, on_machines: Callable[[int], None], on_notice: OnNotice
    ) -> None:
        looks = 0
        while not self._closing.wait(_POLL_S):
            looks += 1
            try:
                going, nodes = draining_nodes(), live_nodes()
                if looks % _WISHES_EVERY == 0:
                    wishes.refresh()
            except ray.exceptions.RayError:
                continue  # the cluster's head does not answer; ask again
            with self._lock:
                told = [(key, s) for id, s in going.items() for key in self._places.drain(id)]
                fresh = self._places.see(nodes)
            for key, notice_s in told:
                on_notice(key, notice_s)
            if fresh:
                on_machines(len(fresh))

    # ---- nodes ---------------------------------------------------------------------------------

    def open_node(
        self, key: str, machine: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        """Reserve the machine's resources for a node and start its keeper.

        Raises:
            RoomTakenError: The machine is gone, or its room was taken in the meantime.
            StartupError: The machine did not answer.
        """
        if self._cluster.is_own:
            self._own.take(key, machine)
            here = self._local.open(key, keeper=keeper, folder=folder)
            return replace(here, memory_share=1 / self._config.cluster.nodes)
        with self._lock:
            node = self._places.node(machine)
            if node is None:
                raise RoomTakenError(f"{key}: its machine is gone")
            self._places.promise(key, machine)
        try:
            return self._open_on(node, key, keeper=keeper, folder=folder)
        except ray.exceptions.RayError as problem:
            raise StartupError(f"{key} on {node.host}: {_first_line(problem)}") from problem

    def _open_on(
        self, node: RayNode, key: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        """Start the actor that reserves the node's CPUs and memory and runs its keeper."""
        held = {"num_cpus": self._bundle.get("CPU", 0.0), "memory": self._bundle.get("memory")}
        hosts = hosts_of(self._bind, own=node.host)
        actor = _remote(NodeActor).options(**held, **_on(node.id)).remote(*hosts)
        with self._lock:
            self._node_actors[key] = actor
        # Actors of ranks with GPUs reserve these themselves, so they wait until the node has room.
        if not self._per_rank["GPU"]:
            self._warm_up(key)
        place = self._opened(actor.open.remote(key, keeper, folder), node, key)
        with self._lock:
            self._places.reserved(key)
        return replace(
            place, zone=node.labels.get(_ZONE_LABEL, ""), memory_share=self._memory_share(node)
        )

    def _warm_up(self, key: str) -> None:
        """Start the ranks' actors and let them import modules while the node's actor starts."""
        actors = self._rank_actors(key)
        with self._lock:
            self._warm[key] = actors
        for actor in actors:
            actor.warm_up.remote()

    def _opened(self, opened: Any, node: RayNode, key: str) -> NodePlace:
        """Wait until a node's actor has started, or until another machine is the better choice.

        Raises:
            RoomTakenError: The machine has no room any more, and another machine has some.
            StartupError: The actor did not start in time.
        """
        asked_s = now_s()
        while True:
            with self._lock:
                patience_s = self._patience_s
            done, _ = ray.wait([opened], timeout=patience_s)
            if done:
                place: NodePlace = ray.get(opened)
                return place
            room, waited_s = self._room_beside(key), now_s() - asked_s
            is_free = bool(room.pop(node.id, 0))
            given_s = _SILENT_S if is_free and room else self._reach_s
            if waited_s > given_s:
                raise StartupError(f"{key}: {node.host} does not answer")
            if is_free:
                continue  # it may be slow to start a process
            if any(room.values()):
                with self._lock:
                    self._patience_s = min(2 * self._patience_s, self._reach_s)
                raise RoomTakenError(f"{key}: {node.host} has no room any more")

    def _room_beside(self, key: str) -> dict[str, int]:
        """Room of each machine now, without subtracting what was promised to this node."""
        now = live_nodes()
        with self._lock:
            self._places.update(now)
            self._places.reserved(key)
            return {machine.id: machine.room for machine in self._places.machines()}

    def _memory_share(self, node: RayNode) -> float:
        """``NodePlace.memory_share``: a rank sees the memory of its own GPU, or the machine's."""
        if self._per_rank["GPU"]:
            return float(self._ranks)
        with self._lock:
            return 1 / max(1, self._places.num_on(node.id))

    def close_node(self, key: str) -> None:
        """End the node's keeper and free its resources; does nothing if the node is closed."""
        with self._lock:
            self._places.close(key)
            left = [*self._warm.pop(key, []), *filter(None, [self._node_actors.pop(key, None)])]
        for actor in left:
            ray.kill(actor)
        self._own.leave(key)
        self._local.close(key)

    # ---- processes -----------------------------------------------------------------------------

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        here = ray.get_runtime_context().get_node_id()
        # max_restarts=0: the driver restarts the controller, not Ray.
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 8}
        actor = _remote(ControllerActor).options(**options, **_on(here)).remote(spec)
        try:
            port, pid = ray.get(actor.place.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise StartupError(f"the controller did not come up within {timeout_s:.0f} s") from None
        except ray.exceptions.RayError as problem:
            raise StartupError(
                f"the controller did not come up: {_first_line(problem)}"
            ) from problem
        self._processes.add("controller", actor, actor.wait.remote(), pid=pid)
        return int(port)

    def start_workers(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the ranks of one node and wait until their processes exist.

        Raises:
            StartupError: The machine does not answer.
        """
        key, there = specs[0].node_key, []
        try:
            with self._lock:
                actors = self._warm.pop(key, [])
            for spec, actor in zip(specs, actors or self._rank_actors(key), strict=True):
                there.append(actor.is_there.remote())
                self._processes.add(spec.worker, actor, actor.run.remote(spec))
            ray.get(there, timeout=self._reach_s)
        except ray.exceptions.RayError as problem:
            raise StartupError(f"{key}: {_first_line(problem)}") from problem

    def _rank_actors(self, key: str) -> list[Any]:
        """Create the actors for a node's ranks.

        On a joined cluster the node's actor reserves the CPUs, so these actors reserve none.
        """
        options = {"num_gpus": self._per_rank["GPU"], "max_restarts": 0}
        if self._cluster.is_own:
            options |= {"num_cpus": self._per_rank["CPU"]}
        else:
            with self._lock:
                home = self._places.home(key)
            options |= {"num_cpus": 0, **_on(home)}
        return [_remote(WorkerActor).options(**options).remote() for _ in range(self._ranks)]

    def kill(self, name: str) -> None:
        self._processes.kill(name)

    def close(self, *, grace_s: float) -> None:
        self._processes.wait(timeout_s=grace_s)
        self._closing.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        self._local.close_all()
        self._processes.kill_all()
        for key in tuple(self._node_actors):
            self.close_node(key)
        if self._wishes is not None:
            with suppress(ray.exceptions.RayError, RuntimeError):  # the cluster's head is gone
                self._wishes.withdraw()
        self._cluster.close()


def _remote(cls: type) -> Any:
    """``ray.remote(cls)``, untyped, because Ray's types lack ``.remote``."""
    return ray.remote(cls)


def _on(node_id: str) -> dict[str, Any]:
    """Actor options that pin an actor to one Ray node."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__

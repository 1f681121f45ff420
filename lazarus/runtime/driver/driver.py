"""The driver starts, watches and ends every process of a run, and reports to the user.

The driver decides nothing about training: the controller says what to start and when the run is
over.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lazarus import errors
from lazarus.control.messages import (
    Body,
    ControllerFailed,
    DriverHello,
    FromDriver,
    Injected,
    KillController,
    KillNode,
    NodeEndsMachine,
    NodeNotice,
    NodesAwaited,
    NodeUp,
    Pulse,
    Record,
    RunOver,
    StartNode,
    StopRun,
    WorkerDied,
)
from lazarus.failure import Cause, Failure, Status
from lazarus.runtime.driver.chaos import FATAL_KINDS, PROCESS_KINDS, Chaos
from lazarus.runtime.driver.controller_life import ControllerLife
from lazarus.runtime.driver.nodes import Nodes
from lazarus.runtime.driver.orders import controller_spec, keeper_config, limits_of, worker_specs
from lazarus.runtime.fence.whereabouts import LastWords
from lazarus.runtime.launch.launcher import Launcher, OnExit
from lazarus.runtime.launch.local_nodes import NodePlace
from lazarus.runtime.rpc.channel import endpoint
from lazarus.runtime.rpc.credentials import check_certificate
from lazarus.runtime.rpc.link import Link
from lazarus.runtime.spec import RunSpec


class Driver:
    """Owner of one run's processes.

    Args:
        spec: The run to start.
        make_launcher: Creates the launcher, given the function to call when a process exits.
        on_event: Called with each event of the run's record, in order, from ``run``.
        say: Shows one line of text to the user.
    """

    def __init__(
        self,
        spec: RunSpec,
        make_launcher: Callable[[OnExit], Launcher],
        on_event: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self._spec = spec
        self.say = say
        self._on_event = on_event
        self._inbox: queue.SimpleQueue[Body] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._dead: list[WorkerDied] = []
        self._last_words = LastWords(spec.scratch)
        self._alive: dict[str, set[str]] = {}  # node name -> its live ranks, oldest node first
        self._wishes: list[StopRun | NodeNotice] = []  # requests of the user and the cluster
        self._doomed: set[str] = set()  # nodes that a random fault will end
        self._chaos: Chaos | None = None
        self._over = False
        self._persisted = spec.resume is not None  # whether a checkpoint exists
        self._awaited: NodesAwaited | None = None
        self._launcher = make_launcher(self._on_exit)
        self._nodes = Nodes(self, self._launcher, limits_of(spec, is_fixed=self._launcher.is_fixed))
        self._link: Link | None = None
        self._life = ControllerLife(
            self._launcher,
            timeouts=spec.config.timeouts,
            on_over=self._controller_over,
        )

    # ---- life ----------------------------------------------------------------------------------

    def run(self) -> RunOver:
        """Start all processes, wait for the end of the run, then end all processes.

        Returns:
            How the run ended.

        Raises:
            StartupError: The controller did not start.
        """
        over = False
        try:
            self._start()
            while True:
                body = self._inbox.get()
                if isinstance(body, RunOver):
                    over = True
                    return body
                self._handle(body)
        finally:
            self._close(over=over)

    def _start(self) -> None:
        spec, host = self._spec, self._launcher.host
        check_certificate(spec.credentials, host=host)
        port = self._life.start(
            controller_spec(spec, host=host, bind_host=self._launcher.bind_host)
        )
        self._address = endpoint(host, port)
        self._link = Link(
            self._address,
            credentials=spec.credentials,
            speaker=FromDriver,
            hello=self._hello,
            on_connect=self._connected,
            on_message=lambda term, body: self._hear(body),
            on_dead=self._controller_lost,
            allowance_s=spec.config.timeouts.controller_restart_s,
        )
        self._link.start()
        self._nodes.start()
        self._launcher.follow_nodes(self._nodes.machines_came, self._noticed)

    def _close(self, *, over: bool) -> None:
        self._over = True
        if self._chaos is not None:
            self._chaos.close()
        self._life.close()
        self._nodes.close()
        # If the run did not end by itself, the driver writes the end of the record. Kill the
        # controller before the link is closed, or it would record a lost driver first.
        if not over:
            self._launcher.close(grace_s=0.0)
        if self._link is not None:
            self._link.close(timeout_s=1.0)
        if over:
            self._launcher.close(grace_s=5.0)

    # ---- what the controller says --------------------------------------------------------------

    def _hear(self, body: Body) -> None:
        """Take a message on the stream's thread; pulses and failures do not wait in the inbox."""
        match body:
            case Pulse():
                self._life.pulse()
            case ControllerFailed(failure=failure):
                self._life.failed(failure)
            case _:
                self._inbox.put(body)

    def _handle(self, body: Body) -> None:
        match body:
            case WorkerDied():
                self._life.died(body.cause)
            case Record(line=line):
                self._recorded(json.loads(line))
            case StartNode(is_extra=True):
                self._nodes.one_more()
            case StartNode():
                self._nodes.held()
            case NodeUp(node_key=key):
                self._nodes.came_up(key)
            case NodeEndsMachine(node_key=key):
                self._nodes.ends_machine(key)
            case KillNode(node_key=key):
                self.take_down(key)
                self._nodes.lost(key, cause=body.cause, is_silent=body.is_silent)
            case KillController():
                self._life.strike()
            case _:
                raise errors.LazarusError(f"the controller sent {type(body).__name__}")

    def _hello(self) -> DriverHello:
        term, number = (0, 0) if self._link is None else self._link.heard
        return DriverHello(run=self._spec.control.run_id, term=term, heard=number)

    def _connected(self) -> None:
        """Resend what a restarted controller cannot know; called whenever the stream opens."""
        with self._lock:
            news = (*self._dead, *self._wishes, *filter(None, [self._awaited]))
        for body in news:
            if self._link is not None:
                self._link.send(body)

    def _wish(self, body: StopRun | NodeNotice) -> None:
        """Send a request now, and again to every restarted controller."""
        with self._lock:
            if body not in self._wishes:
                self._wishes.append(body)
        if self._link is not None:
            self._link.send(body)

    def _recorded(self, event: dict[str, Any]) -> None:
        if event["event"] == "run_started" and self._chaos is None:
            chaos = self._spec.config.faults.parsed_chaos()
            self._chaos = None if chaos is None else Chaos(chaos, self)
        self._persisted = self._persisted or event["event"] == "checkpoint_persisted"
        self._on_event(event)

    def has_room(self) -> bool:
        """Whether the run may have one more node (``cluster.max_nodes``)."""
        limit = self._spec.config.cluster.max_nodes
        with self._lock:
            return limit is None or len(self._alive) < limit

    def live_nodes(self) -> list[str]:
        """Names of the live nodes, without those that an injected fault is about to end."""
        with self._lock:
            return [node for node in self._alive if node not in self._doomed]

    def inject(self, kind: str, node_key: str, spec: str) -> None:
        """Inject a fault into one node and report the fault to the controller.

        Args:
            kind: One of ``chaos.CHAOS_KINDS``.
            node_key: The node; empty for "join" and "controller".
            spec: The fault's name in the record, such as "chaos:kill".

        Raises:
            LazarusError: ``kind`` is unknown.
        """
        assert self._link is not None
        self._link.send(Injected(kind=kind, node_key=node_key, spec=spec))
        if kind in FATAL_KINDS:
            self._doomed.add(node_key)
            self._nodes.ends_machine(node_key)
        match kind:
            case "kill":
                self.take_down(node_key)
            case "join":
                self._nodes.one_more()
            case "leave":
                self.notice(node_key, notice_s=0.0, cause="leave")
            case "controller":
                self._life.strike()
            case _ if kind in PROCESS_KINDS:
                pass  # the controller passes these on to the process
            case _:
                raise errors.LazarusError(f"the driver cannot inject {kind}")

    # ---- nodes ---------------------------------------------------------------------------------

    def take_down(self, key: str) -> None:
        """Kill all processes of a node and close its place; does nothing if the node is gone."""
        with self._lock:
            self._alive.pop(key, None)
        for local_rank in range(self._spec.control.ranks_per_node):
            self._launcher.kill(f"{key}.{local_rank}")
            self._last_words.keep(f"{key}.{local_rank}")
        self._launcher.close_node(key)

    def start_node(self) -> str:
        """Start one more node and wait until its processes are started. Returns the node's name.

        Raises:
            StartupError: There is no room for another node, or the node did not start.
        """
        return self._nodes.one_more().result()

    def bring_up(self, key: str, machine: str) -> None:
        """Start a node's processes on a machine."""
        self._start_workers(key, self._open_node(key, machine))

    def thread_died(self, name: str, problem: BaseException) -> None:
        """End the run as failed: without its threads the driver cannot manage nodes."""
        text = f"driver's thread {name}: {type(problem).__name__}: {problem}"
        self._failed(Failure(cause=Cause.INTERNAL, message=text))

    def tell(self, body: Body) -> None:
        """Send a message to the controller; the newest ``NodesAwaited`` is resent on reconnect."""
        if isinstance(body, NodesAwaited):
            with self._lock:
                self._awaited = body
        if self._link is not None:
            self._link.send(body)

    def _open_node(self, key: str, machine: str) -> NodePlace:
        return self._launcher.open_node(
            key, machine, keeper=keeper_config(self._spec), folder=self._spec.scratch / key
        )

    def _start_workers(self, key: str, place: NodePlace) -> None:
        specs = worker_specs(self._spec, key, place, controller=self._address)
        with self._lock:
            self._alive[key] = {spec.worker for spec in specs}
        self._launcher.start_workers(specs)

    def _on_exit(self, name: str, cause: str) -> None:
        if self._over:
            return
        if name == "controller":
            self._inbox.put(WorkerDied(worker=name, cause=cause))
            return
        if name == "launcher":
            text = f"the thread that watches the run's processes died: {cause}"
            self._failed(Failure(cause=Cause.INTERNAL, error="InternalError", message=text))
            return
        key = name.rpartition(".")[0]
        died = self._last_words.of(name, cause)
        with self._lock:
            self._dead.append(died)
            left = self._alive.get(key)
            if left is not None:
                left.discard(name)
                if not left:
                    del self._alive[key]
        if self._link is not None:
            self._link.send(died)
        if not left:
            self._launcher.close_node(key)
        self._nodes.died(key, cause=cause)

    def _failed(self, failure: Failure) -> None:
        self._inbox.put(RunOver(status="failed", failure=failure))

    def _controller_over(self, failure: Failure) -> None:
        """End the run because the controller will not be restarted.

        After a storage error the run ends as "short" if it has a checkpoint to resume from.
        """
        if failure.cause is Cause.STORAGE and self._persisted:
            way_out = f"go on with: lazarus train --resume {self._spec.run_dir}"
            self._inbox.put(RunOver(status="short", failure=replace(failure, way_out=way_out)))
            return
        self._failed(failure)

    def _controller_lost(self, reason: str) -> None:
        self._inbox.put(RunOver(status="failed", failure=_unreachable(reason)))

    # ---- what the user says --------------------------------------------------------------------

    def stop(self, *, now: bool, reason: str, preempted: bool = False) -> None:
        """Ask the controller to end the run.

        Args:
            now: End at once; otherwise at the next commit.
            reason: Shown to the user and written to the record.
            preempted: The machine is being taken away, so the run ends as "short", to be resumed.
        """
        self._nodes.enough()
        self._wish(StopRun(now=now, reason=reason, preempted=preempted))

    def fail(self, failure: Failure) -> None:
        """Ask the controller to end the run at once as failed, for an error in the driver."""
        self._nodes.enough()
        self._wish(StopRun(now=True, reason=failure.message, failure=failure))

    def notice(self, node_key: str, *, notice_s: float, cause: str) -> None:
        """Tell the controller that a node will go away.

        Args:
            node_key: The node.
            notice_s: Seconds until the node goes; 0: unknown, or at once.
            cause: Why: "drain" or "leave".
        """
        self._wish(NodeNotice(node_key=node_key, notice_s=notice_s, cause=cause))

    def _noticed(self, node_key: str, notice_s: float) -> None:
        self.notice(node_key, notice_s=notice_s, cause="drain")

    def abandon(
        self, reason: str, *, cause: Cause = Cause.REQUEST, status: Status = "short"
    ) -> None:
        """Make ``run`` return now, without waiting for the controller."""
        failure = Failure(cause=cause, error="StoppedError", message=reason)
        self._inbox.put(RunOver(status=status, failure=failure))


def _unreachable(message: str) -> Failure:
    text = f"the controller cannot be reached: {message}"
    return Failure(cause=Cause.INTERNAL, error="InternalError", message=text)

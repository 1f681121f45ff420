"""Starting and ending a run's processes: a port with two adapters (plain processes, Ray actors)."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import termios
import threading
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol

from lazarus.basics.threads import say_so, spawn
from lazarus.control.cluster.replacing import Machine
from lazarus.errors import ControllerDiedError, JournalError, RecordError, StartupError
from lazarus.failure import Failure
from lazarus.record.ownership import started_at
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.local_nodes import LocalNodes, NodePlace, OwnPlaces
from lazarus.runtime.spec import ControllerSpec, WorkerSpec

_PR_SET_PDEATHSIG = 1
# A cause that blames nobody: its children cannot outlive it, and nobody has their exit codes.
ORPHANED = "the process that starts the others was killed"
LOOPBACK = "127.0.0.1"
_EVERYWHERE = ("0.0.0.0", "::")  # to listen on, never to be reached at

OnExit = Callable[[str, str], None]  # process name, cause
OnNotice = Callable[[str, float], None]  # node key, seconds until it goes (0: unknown)


class Launcher(Protocol):
    """Owns every process of one run. ``on_exit`` is called from a thread of the launcher."""

    host: str  # address of the driver's machine, at which others reach the controller
    bind_host: str  # what the controller listens on, there

    is_fixed: bool  # True: no machine ever comes by itself

    def machines(self) -> tuple[Machine, ...]:
        """The machines that live now, with the room that they have now."""

    def name_of(self, machine: str) -> str:
        """A machine as people know it."""

    def shortage(self) -> str:
        """What the machines lack for one more node, with the numbers."""

    def add_machine(self) -> None:
        """One more machine, where machines are made up; nothing where they come by themselves."""

    def open_node(
        self, key: str, machine: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        """Take room for a node on this machine, and start its keeper there if it has one.

        Raises:
            RoomTakenError: Somebody else has the room.
            StartupError, KeeperUnavailableError: It did not start.
        """

    def close_node(self, key: str) -> None:
        """End what a node has beside its ranks; fine if it is gone."""

    def follow_nodes(self, on_machines: Callable[[int], None], on_notice: OnNotice) -> None:
        """Say from now on when machines come, and how many; and when a node will go."""

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        """Start it and wait until it listens. Returns its port."""

    def start_workers(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the ranks of one node.

        Raises:
            StartupError: Their machine does not answer.
        """

    def kill(self, name: str) -> None:
        """SIGKILL one process by name ("controller" or a worker's); fine if it is gone."""

    def close(self, *, grace_s: float) -> None:
        """Wait for the processes that are about to end, then end the rest. Leaves nothing."""


def hosts_of(bind: str, *, own: str) -> tuple[str, str]:
    """Where a machine's processes are reached, and what they listen on, for ``security.bind``.

    Args:
        bind: As configured.
        own: The machine's address as the others of the run know it.
    """
    if bind == "auto":
        return own, own
    return (own, bind) if bind in _EVERYWHERE else (bind, bind)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel end this process when the one that started it dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, number)


def _driver_watch() -> Callable[[], bool]:
    """Tells, in a child of the fork server, whether the driver that started that one is gone."""
    fork_server = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
    driver = int(fork_server.rpartition(")")[2].split()[1])
    since = started_at(driver)
    return lambda: since is None or started_at(driver) != since


def _has_bytes(pipe: int) -> bool:
    """Whether something can be read before its end; the fork server writes exit codes there."""
    count = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0] > 0


def _worker_main(spec: WorkerSpec) -> None:
    die_with_parent()
    from lazarus.runtime.worker.process import run_worker

    code = run_worker(spec)
    os._exit(code)  # no exit handlers of libraries: the state is gone, and they may hang


def _controller_main(spec: ControllerSpec, pipe: Any) -> None:
    die_with_parent(signal.SIGTERM)  # time to put the end of the run on record
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from lazarus.runtime.controller.controller_end import failure_of
    from lazarus.runtime.controller.shell import start_controller

    def bound(port: int) -> None:
        pipe.send(port)
        pipe.close()

    try:
        start_controller(spec, bound, is_orphan=_driver_watch())
    except BaseException as problem:  # noqa: BLE001 - the edge of the process
        if isinstance(problem, JournalError | RecordError):
            print(f"controller: {problem}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(problem)
        if not pipe.closed:  # it never listened: nobody else can hear why
            pipe.send(failure_of(problem).to_json())
        os._exit(1)  # not even gRPC's threads live on
    os._exit(0)


class ProcessLauncher:
    """Plain processes from a fork server that has imported torch: quick to start, easy to kill.

    Args:
        host: Where processes reach each other.
        bind_host: What controller and keepers listen on, if it is not ``host``.
        nodes: Nodes that share this machine.
        is_warm: False: the fork server has imported nothing, so every process imports torch
            itself, as under torchrun.
    """

    is_fixed = True

    def __init__(
        self,
        on_exit: OnExit,
        *,
        host: str = LOOPBACK,
        bind_host: str = "",
        nodes: int = 1,
        is_warm: bool = True,
    ) -> None:
        self.host, self.bind_host = host, bind_host or host
        self._memory_share = 1 / nodes
        self._nodes = LocalNodes(host, bind_host=self.bind_host)
        self._places = OwnPlaces(nodes)
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lazarus.runtime.launch.preload"] if is_warm else [])
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._processes: dict[str, Any] = {}
        self._wake_in, self._wake_out = os.pipe()
        self._closing = False
        self._watcher = spawn("launcher", self._watch, on_death=self._blind)

    def machines(self) -> tuple[Machine, ...]:
        return self._places.machines()

    def name_of(self, machine: str) -> str:
        return f"{machine} of {self.host}"

    def shortage(self) -> str:
        return self._places.shortage()

    def add_machine(self) -> None:
        self._places.add()

    def open_node(
        self, key: str, machine: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        self._places.take(key, machine)
        place = self._nodes.open(key, keeper=keeper, folder=folder)
        return replace(place, memory_share=self._memory_share)

    def close_node(self, key: str) -> None:
        self._places.leave(key)
        self._nodes.close(key)

    def follow_nodes(self, on_machines: Callable[[int], None], on_notice: OnNotice) -> None:
        """This machine neither comes nor goes."""

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        here, there = self._context.Pipe(duplex=False)
        self._start("controller", _controller_main, (spec, there))
        there.close()
        if not here.poll(timeout_s):
            raise StartupError(f"the controller did not come up within {timeout_s:.0f} s")
        try:
            answer = here.recv()
        except EOFError:
            raise ControllerDiedError("the controller ended before it listened") from None
        if isinstance(answer, str):
            message = Failure.from_json(answer).message
            raise ControllerDiedError(f"the controller cannot start: {message}", failure=answer)
        return int(answer)

    def start_workers(self, specs: Sequence[WorkerSpec]) -> None:
        for spec in specs:
            self._start(spec.worker, _worker_main, (spec,))

    def _start(self, name: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        process = self._context.Process(target=target, args=args, name=name, daemon=True)
        process.start()
        with self._lock:
            self._processes[name] = process
        os.write(self._wake_out, b".")

    def pid_of(self, name: str) -> int | None:
        with self._lock:
            process = self._processes.get(name)
        return None if process is None else int(process.pid)

    def kill(self, name: str) -> None:
        with self._lock:
            process = self._processes.get(name)
        if process is not None:
            process.kill()

    def _blind(self, name: str, problem: BaseException) -> None:
        """No death would be seen any more: the owner must not go on as if all lived."""
        say_so(name, problem)
        self._on_exit("launcher", f"{type(problem).__name__}: {problem}")

    def _watch(self) -> None:
        while True:
            with self._lock:
                alive = {process.sentinel: name for name, process in self._processes.items()}
            ready = connection.wait([self._wake_in, *alive])
            if self._wake_in in ready:
                os.read(self._wake_in, 4096)
                if self._closing:
                    return
            for sentinel in ready:
                name = alive.get(sentinel)
                if name is not None:
                    self._reap(name)

    def _reap(self, name: str) -> None:
        with self._lock:
            process = self._processes.pop(name)
        is_told = _has_bytes(process.sentinel)
        process.join()
        code = process.exitcode
        cause = f"process exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._on_exit(name, cause if is_told else ORPHANED)

    def close(self, *, grace_s: float) -> None:
        self._nodes.close_all()
        with self._lock:
            processes = list(self._processes.values())
        connection.wait([p.sentinel for p in processes], timeout=0)
        for process in processes:
            process.join(grace_s)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._closing = True
        os.write(self._wake_out, b".")
        self._watcher.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

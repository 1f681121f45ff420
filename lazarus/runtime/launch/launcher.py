"""Starts and ends a run's processes: the ``Launcher`` interface, and one for plain processes.

``ray_launcher.py`` has the implementation for Ray actors.
"""

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
# Cause of a process's death when the fork server died: its children die too, without exit codes.
ORPHANED = "the process that starts the others was killed"
LOOPBACK = "127.0.0.1"
_EVERYWHERE = ("0.0.0.0", "::")  # addresses to listen on that no process can connect to

OnExit = Callable[[str, str], None]  # process name, cause
OnNotice = Callable[[str, float], None]  # node key, seconds until the node goes (0: unknown)


class Launcher(Protocol):
    """Starts and ends every process of one run.

    A launcher calls the ``OnExit`` function that it was created with, from a thread of its own,
    whenever a process ends.
    """

    host: str  # address at which other processes reach the controller, on the driver's machine
    bind_host: str  # address that the controller listens on

    is_fixed: bool  # True: no new machine ever appears by itself

    def machines(self) -> tuple[Machine, ...]:
        """The live machines, with their current room for nodes."""

    def name_of(self, machine: str) -> str:
        """Name of a machine for messages, given its id."""

    def shortage(self) -> str:
        """Message that says what the machines lack for one more node, with the numbers."""

    def add_machine(self) -> None:
        """Add a place for one more node on this computer; does nothing on a joined cluster."""

    def open_node(
        self, key: str, machine: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        """Take room for a node on a machine and start its keeper there.

        Args:
            key: The node's name.
            machine: Id of the machine.
            keeper: Settings of the node's keeper; None: the node has no keeper.
            folder: Scratch folder of the node; created if it is missing.

        Raises:
            RoomTakenError: The machine's room was taken in the meantime.
            StartupError, KeeperUnavailableError: The node or its keeper did not start.
        """

    def close_node(self, key: str) -> None:
        """End the node's keeper and free its room; does nothing if the node is closed."""

    def follow_nodes(self, on_machines: Callable[[int], None], on_notice: OnNotice) -> None:
        """Begin to call ``on_machines`` with the number of new machines, and ``on_notice``."""

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        """Start the controller and wait until it listens. Returns its port.

        Raises:
            StartupError: It did not start; ControllerDiedError if its process ended.
        """

    def start_workers(self, specs: Sequence[WorkerSpec]) -> None:
        """Start the ranks of one node.

        Raises:
            StartupError: The node's machine does not answer.
        """

    def kill(self, name: str) -> None:
        """SIGKILL "controller" or a worker by name; does nothing if the process is gone."""

    def close(self, *, grace_s: float) -> None:
        """Wait for processes to end for up to ``grace_s``, then kill the rest."""


def hosts_of(bind: str, *, own: str) -> tuple[str, str]:
    """Addresses of a machine's processes, from the setting ``security.bind``.

    Args:
        bind: The setting: "auto" or an address.
        own: Address at which other machines of the run reach this one.

    Returns:
        The address to connect to, and the address to listen on.
    """
    if bind == "auto":
        return own, own
    return (own, bind) if bind in _EVERYWHERE else (bind, bind)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Make the kernel send a signal to this process when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, number)


def _driver_watch() -> Callable[[], bool]:
    """For a child of the fork server: a function that says whether the driver is gone.

    The driver is the parent of the fork server.
    """
    fork_server = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
    driver = int(fork_server.rpartition(")")[2].split()[1])
    since = started_at(driver)
    return lambda: since is None or started_at(driver) != since


def _has_bytes(pipe: int) -> bool:
    """Whether a pipe has bytes to read: the fork server writes a child's exit code into it."""
    count = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0] > 0


def _worker_main(spec: WorkerSpec) -> None:
    die_with_parent()
    from lazarus.runtime.worker.process import run_worker

    code = run_worker(spec)
    os._exit(code)  # skip the exit handlers of libraries, which may hang


def _controller_main(spec: ControllerSpec, pipe: Any) -> None:
    die_with_parent(signal.SIGTERM)  # not SIGKILL: time to write the end of the run to the record
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
        if not pipe.closed:  # the controller never listened: this pipe alone can carry the reason
            pipe.send(failure_of(problem).to_json())
        os._exit(1)  # do not wait for gRPC's threads
    os._exit(0)


class ProcessLauncher:
    """Starts plain processes on this machine from a fork server that has imported torch.

    Args:
        on_exit: Called when a process ends; with the name "launcher" if the watching thread dies.
        host: Address at which processes reach each other.
        bind_host: Address that the controller and the keepers listen on; empty: ``host``.
        nodes: Number of nodes that share this machine.
        is_warm: False: the fork server imports nothing, so every process imports torch itself, as
            under torchrun.
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
        """Do nothing: this machine is the only one."""

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
        """Report the death of the watching thread: no process's end would be noticed any more."""
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

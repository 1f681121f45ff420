"""Progress of the training thread as other threads see it, and the faults scripted for it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace as changed

from lazarus.control.messages import FaultFired, LeaveRequest, Tail
from lazarus.errors import LazarusError
from lazarus.faults import FaultSpec, parse_fault
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.trail import Trail
from lazarus.runtime.fence.whereabouts import Whereabouts

DEFAULT_PHASE = "forward"  # phase of a fault that names none
RANDOM_OPTIONS = {"slow": {"factor": 3.0, "steps": 10.0}}  # options of faults drawn at random


class InjectedCrashError(LazarusError):
    """Raised in the training thread by a scripted ``crash`` fault."""


class Observer:
    """Phase, progress and waiting time of the training thread; fires this node's scripted faults.

    Args:
        ledger: Gives the generation for messages.
        faults: Scripted faults that may strike on this rank.
        send: Sends a message to the controller.
        node_folder: Folder in which the processes of this node are registered.
        go_timeout_s: How long a fault waits for the controller to record it before it is dropped.
        is_first: Whether this rank fires the faults that name no node.
    """

    def __init__(
        self,
        *,
        ledger: StepLedger,
        faults: Sequence[FaultSpec],
        send: Callable[[FaultFired | LeaveRequest], None],
        node_folder: Path,
        go_timeout_s: float,
        is_first: Callable[[], bool] = lambda: True,
    ) -> None:
        self.where = Whereabouts()
        self._is_first = is_first  # whether this rank fires faults that name no node
        self._ledger = ledger
        self._faults = list(faults)
        self._send = send
        self._node_folder = node_folder
        self._go_timeout_s = go_timeout_s
        self._go = threading.Event()
        self._forever = threading.Event()
        self._waiting_since = 0.0
        self.waited_s = 0.0  # time inside collectives since `begin_step`
        self.step = 0
        self.trail: Trail | None = None  # trail of the group that ran the newest collective
        self._thread = 0  # identifier of the training thread
        self.phase = ""
        self.progress = 0
        self.is_waiting = False
        self.leaving = False
        self.announced: FaultFired | None = None  # fault that waits for the controller's Go
        self._slow: tuple[float, int] | None = None  # factor, last step
        self._num_fired = 0
        self._is_done = False
        self._drawn = ""  # kind of a random fault that is due; already recorded

    def add_faults(self, specs: Sequence[str], *, node: int, rank: int) -> None:
        """Take over the scripted faults that are for this node or for no particular node.

        Ranks above 0 take only ``slow`` and ``stall`` faults.
        """
        for fault in map(parse_fault, specs):
            mine = fault.node in (None, node)
            if mine and (rank == 0 or fault.kind in ("slow", "stall")):
                self._faults.append(fault)

    def begin_step(self, step: int) -> None:
        """Note that ``step`` begins; ask to leave if a scripted leave is due at the next step."""
        self.step = self.where.step = step
        self._thread = threading.get_ident()
        self.waited_s = 0.0
        for fault in self._faults:
            if fault.kind == "leave" and fault.step == step + 1 and not self.leaving:
                self._fired(fault)
                self._ask_to_leave(fault)

    def tail(self) -> Tail:
        """The training thread's newest exchanges and its place in user code, for a report."""
        trail = self.trail
        if trail is None:
            return Tail()
        found = trail.tail(step=self.step, thread=self._thread)
        return found if found.place else changed(found, place=self.where.now.place)

    def _ask_to_leave(self, fault: FaultSpec) -> None:
        self.leaving = True
        notice = float(fault.options.get("notice", 0.0))
        self._send(LeaveRequest(generation=self._ledger.gen, notice_s=notice, cause="leave"))

    def enter(self, phase: str) -> None:
        """Note that the training thread begins ``phase``, and fire the faults that are due there.

        Raises:
            InjectedCrashError: A scripted ``crash`` is due.
        """
        self.phase = phase
        self.progress += 1
        if self._drawn and phase == DEFAULT_PHASE:
            kind, self._drawn = self._drawn, ""
            options = RANDOM_OPTIONS.get(kind, {})
            self._act(FaultSpec(kind=kind, node=None, step=self.step, options=options))
        for fault in tuple(self._faults):
            if self._due(fault, phase):
                self._faults.remove(fault)
                self._strike(fault)

    def _due(self, fault: FaultSpec, phase: str) -> bool:
        if fault.kind == "leave" or phase != (fault.phase or DEFAULT_PHASE):
            return False
        if fault.node is None and not self._is_first():
            return False
        between_steps = phase in ("reconfigure", "transfer")
        return self.step >= fault.step if between_steps else self.step == fault.step

    def moved(self) -> None:
        """Count progress: the training thread has done one more part of a long operation."""
        self.progress += 1

    def waiting(self, label: str) -> None:
        """Note that the training thread enters a collective, where it waits for other ranks."""
        self.progress += 1
        self._waiting_since = time.monotonic()
        self.is_waiting = True

    def done(self) -> None:
        """Note that the training thread has left the collective, and add up the waiting time."""
        self.is_waiting = False
        self.waited_s += time.monotonic() - self._waiting_since
        self.progress += 1

    def go(self, *, is_done: bool = False) -> None:
        """Let an announced fault happen: the controller has recorded it.

        Args:
            is_done: Another rank has already fired the fault, so this rank must not.
        """
        self.announced = None
        self._is_done = is_done
        self._go.set()

    def drag(self, own_s: float) -> None:
        """Sleep so that a rank scripted to be slow takes ``factor`` times its own compute time.

        Args:
            own_s: Seconds that the rank has computed in this step.
        """
        if self._slow is not None:
            factor, last = self._slow
            if self.step > last:
                self._slow = None
            else:
                self._forever.wait((factor - 1.0) * own_s)

    def _fired(self, fault: FaultSpec) -> None:
        self._go.clear()
        self._num_fired += 1
        self.announced = FaultFired(
            generation=self._ledger.gen,
            step=self.step,
            kind=fault.kind,
            phase=fault.phase or DEFAULT_PHASE,
            spec=str(fault),
            count=int(fault.options.get("count", 1)),
            number=self._num_fired,
        )
        self._send(self.announced)

    def _strike(self, fault: FaultSpec) -> None:
        self._fired(fault)
        if not self._go.wait(self._go_timeout_s):
            return  # no controller: a fault must not happen unrecorded
        if not self._is_done:
            self._act(fault)

    def strike(self, kind: str) -> None:
        """Fire a random fault of this kind at the next forward pass."""
        self._drawn = kind

    def _act(self, fault: FaultSpec) -> None:
        match fault.kind:
            case "kill":
                kill_node(self._node_folder)
            case "stop":
                stop_self(fault.options.get("for"))
            case "stall":
                self._forever.wait(fault.options.get("for"))
            case "slow":
                last = fault.step + int(fault.options.get("steps", 1)) - 1
                self._slow = (float(fault.options.get("factor", 2.0)), last)
            case "crash":
                raise InjectedCrashError(f"injected crash: {fault}")
            case _:
                pass  # joins, cuts and controller faults: carried out by the controller


def register_process(node_folder: Path) -> None:
    """Register this process in its node's folder, so that a fault can end the whole node."""
    node_folder.mkdir(parents=True, exist_ok=True)
    (node_folder / str(os.getpid())).touch()


def kill_node(node_folder: Path) -> None:
    """Send SIGKILL to every process of the node, to this process last."""
    own = os.getpid()
    for path in node_folder.iterdir():
        if path.name.isdigit() and int(path.name) != own:
            try:
                os.kill(int(path.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
    os.kill(own, signal.SIGKILL)


def stop_self(for_s: float | None) -> None:
    """Send SIGSTOP to this process; a child process continues it after ``for_s`` seconds."""
    pid = os.getpid()
    if for_s is not None:
        script = f"sleep {float(for_s)}; kill -CONT {pid}"
        subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
    os.kill(pid, signal.SIGSTOP)

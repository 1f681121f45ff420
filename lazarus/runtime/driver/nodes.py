"""Starts the run's nodes and replaces lost ones, without blocking the caller.

One thread owns the fleet. Public methods queue a call for that thread and return; every start of a
node runs in a thread of its own, within the launcher's time limits. What to start, and where, is
decided by ``lazarus.control.cluster.replacing``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from lazarus.basics.threads import spawn
from lazarus.control.cluster import replacing
from lazarus.control.cluster.replacing import Fleet, Limits
from lazarus.control.messages import Body, MachineJudged, NodesAwaited
from lazarus.errors import LazarusError, RoomTakenError, StartupError
from lazarus.runtime.launch.launcher import Launcher

_LOOK_S = 0.5  # between two searches for free machines while nodes are missing
_SAY_S = 5.0  # between two "waiting for nodes" lines
_SAY_LATER_S = 60.0  # the same after the first minute
_AT_ONCE = 64  # most nodes that start at the same time
_JOIN_S = 2.0


class Owner(Protocol):
    """Starts and ends the processes of one node, and passes messages on: the driver."""

    def bring_up(self, key: str, machine: str) -> None:
        """Start a node's processes. Called in a thread of its own.

        Raises:
            RoomTakenError: Another job took the machine's room.
            StartupError, KeeperUnavailableError, OSError: The processes did not start.
        """

    def take_down(self, key: str) -> None:
        """End all processes of a node."""

    def tell(self, body: Body) -> None:
        """Send a message to the controller; a restarted one gets the newest ``NodesAwaited``."""

    def say(self, text: str) -> None:
        """Show one line of text to the user."""

    def thread_died(self, name: str, problem: BaseException) -> None:
        """Handle the death of a thread of ``Nodes`` by an unexpected error."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """A request for a node beyond ``Limits.wanted``; the future resolves to the node's name."""

    made: Future[str]


class Nodes:
    """The nodes of one run: starts missing ones until ``close``."""

    def __init__(self, owner: Owner, launcher: Launcher, limits: Limits) -> None:
        self._owner, self._launcher = owner, launcher
        self._fleet = Fleet(limits=limits)
        self._wanted_at_first = limits.wanted
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wishes: list[_Wish] = []
        self._asked: dict[str, _Wish] = {}  # node key -> the request that the node is started for
        self._causes: dict[str, str] = {}  # node key -> how its process ended, until ``lost``
        self._num_started = 0
        self._gate = threading.Semaphore(_AT_ONCE)
        self._awaited = NodesAwaited()
        self._said_s = self._waiting_s = time.monotonic()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- news, from any thread -----------------------------------------------------------------

    def start(self) -> None:
        """Begin to start the wanted nodes."""
        self._thread = spawn("nodes", self._run, on_death=self._owner.thread_died)

    def came_up(self, key: str) -> None:
        """Note that all processes of a node have said hello to the controller."""
        self._post(partial(self._came_up, key))

    def died(self, key: str, *, cause: str) -> None:
        """Note that a process of a node ended.

        A node that was not up has failed to start. For a node that was up, the controller decides
        whether the node is lost.
        """
        self._post(partial(self._died, key, cause))

    def lost(self, key: str, *, cause: str, is_silent: bool) -> None:
        """Note that the controller declared a node lost; see ``replacing.gone``."""
        self._post(partial(self._gone, key, cause, is_silent=is_silent))

    def ends_machine(self, key: str) -> None:
        """Note that no node may be started in this node's place once the node is gone."""
        self._post(partial(self._ends_machine, key))

    def held(self) -> None:
        """Note that training is on hold because there are too few nodes."""
        self._post(self._held)

    def enough(self) -> None:
        """Start no more nodes, because the run is ending."""
        self._post(self._enough)

    def machines_came(self, count: int) -> None:
        """Start a node on each of ``count`` new machines, up to ``Limits.most``."""
        self._post(partial(self._machines_came, count))

    def one_more(self) -> Future[str]:
        """Start a node beyond ``Limits.wanted``.

        Returns:
            A future that resolves to the node's name, or raises StartupError.
        """
        wish = _Wish(Future())
        self._post(partial(self._one_more, wish))
        return wish.made

    def close(self) -> None:
        """Stop starting nodes. Starts under way end within the launcher's time limits."""
        self._closing.set()
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        for key, placed in self._fleet.nodes.items():
            if not placed.is_up:
                self._owner.take_down(key)
        for wish in (*self._wishes, *self._asked.values()):
            if not wish.made.done():
                wish.made.set_exception(StartupError("the run is over"))

    def _post(self, act: Callable[[], None]) -> None:
        self._inbox.put(act)

    # ---- the one thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self._closing.is_set():
                self._look()
            try:
                act = self._inbox.get(timeout=self._pause_s())
            except queue.Empty:
                continue
            if act is None:
                return
            act()

    def _pause_s(self) -> float | None:
        """Seconds until the next ``_look``; None: wait for the next queued call."""
        if self._fleet.missing or any(not placed.is_up for placed in self._fleet.nodes.values()):
            return _LOOK_S
        return None

    def _look(self) -> None:
        now_s = time.monotonic()
        for key in replacing.overdue(self._fleet, now_s=now_s):
            limit = self._fleet.limits.start_s
            self._failed(key, f"{key} was not up within {limit:.0f} s")
        count = self._fleet.missing + len(self._wishes)
        if count:
            machines = self._launcher.machines()
            chosen = replacing.starts(self._fleet, machines, count=count, now_s=now_s)
            for number, machine in enumerate(chosen):
                needed = number < count - len(self._wishes)
                self._order(machine, None if needed else self._wishes.pop(0))
            self._refuse_wishes()
            if reason := replacing.hopeless(self._fleet, machines):
                self._news(NodesAwaited(reason=reason, is_hopeless=True))
                return
        self._tell_what_is_awaited(now_s)

    def _order(self, machine: str, wish: _Wish | None) -> None:
        key = f"node-{self._num_started}"
        self._num_started += 1
        if wish is not None:
            self._asked[key] = wish
        self._fleet = replacing.ordered(self._fleet, key, machine, now_s=time.monotonic())
        spawn(f"start-{key}", self._bring_up, key, machine, on_death=self._owner.thread_died)

    def _refuse_wishes(self) -> None:
        for wish in self._wishes:
            text = f"no room for one more node: {self._launcher.shortage()}"
            wish.made.set_exception(StartupError(text))
        self._wishes.clear()

    def _bring_up(self, key: str, machine: str) -> None:
        """Start one node, in a thread of its own, and queue the outcome for the fleet's thread."""
        with self._gate:
            if self._closing.is_set():
                return
            try:
                self._owner.bring_up(key, machine)
            except RoomTakenError:
                self._post(partial(self._taken, key))
            except (LazarusError, OSError) as problem:
                self._post(partial(self._failed, key, str(problem)))
            else:
                self._post(partial(self._started, key))

    # ---- what news means -----------------------------------------------------------------------

    def _started(self, key: str) -> None:
        if key not in self._fleet.nodes:  # lost or overdue in the meantime
            self._owner.take_down(key)
            return
        if (wish := self._asked.pop(key, None)) is not None:
            wish.made.set_result(key)

    def _taken(self, key: str) -> None:
        self._fleet = replacing.taken(self._fleet, key)
        self._owner.take_down(key)
        if (wish := self._asked.pop(key, None)) is not None:
            self._wishes.append(wish)

    def _failed(self, key: str, reason: str) -> None:
        if key not in self._fleet.nodes:
            return
        self._owner.say(f"a node did not start: {reason}")
        self._owner.take_down(key)
        self._gone(key, reason)

    def _came_up(self, key: str) -> None:
        self._fleet = replacing.came_up(self._fleet, key, now_s=time.monotonic())

    def _died(self, key: str, cause: str) -> None:
        placed = self._fleet.nodes.get(key)
        if placed is None:
            return
        if not placed.is_up:
            self._failed(key, f"{key} ended before it was up: {cause}")
        else:
            self._causes[key] = cause

    def _gone(self, key: str, cause: str, *, is_silent: bool = False) -> None:
        # How the process ended says more than the controller's cause, such as a closed stream.
        cause = self._causes.pop(key, cause)
        self._fleet, verdicts = replacing.gone(
            self._fleet, key, cause=cause, now_s=time.monotonic(), is_silent=is_silent
        )
        if (wish := self._asked.pop(key, None)) is not None:
            wish.made.set_exception(StartupError(f"{key} did not start: {cause}"))
        for verdict in verdicts:
            name = self._launcher.name_of(verdict.machine)
            self._owner.tell(
                MachineJudged(machine=name, reason=verdict.reason, is_banned=verdict.is_banned)
            )

    def _ends_machine(self, key: str) -> None:
        self._fleet = replacing.ends_machine(self._fleet, key)

    def _held(self) -> None:
        self._fleet = replacing.held(self._fleet, needed=self._wanted_at_first)

    def _enough(self) -> None:
        self._fleet = replacing.enough(self._fleet)

    def _machines_came(self, count: int) -> None:
        for _ in range(min(count - self._fleet.missing, self._fleet.spare)):
            wish = _Wish(Future())
            self._wishes.append(wish)

    def _one_more(self, wish: _Wish) -> None:
        self._launcher.add_machine()
        self._wishes.append(wish)

    # ---- what is waited for --------------------------------------------------------------------

    def _tell_what_is_awaited(self, now_s: float) -> None:
        """Report missing nodes: to the controller on change, to the user every few seconds."""
        fleet = self._fleet
        coming = sum(not placed.is_up for placed in fleet.nodes.values())
        text = self._launcher.shortage() if fleet.missing else ""
        if text and replacing.is_troubled(fleet):
            text = f"machines on which nodes do not start are left alone for now; {text}"
        if (fleet.missing, coming) != (self._awaited.missing, self._awaited.coming):
            is_troubled = replacing.is_troubled(fleet)
            self._news(
                NodesAwaited(
                    missing=fleet.missing, coming=coming, reason=text, is_troubled=is_troubled
                )
            )
        if not fleet.missing + coming:
            if self._said_s > self._waiting_s:
                self._owner.say(f"{len(fleet.nodes)} nodes are up")
            self._waiting_s = self._said_s = now_s
            return
        waited_s = now_s - self._waiting_s
        if now_s - self._said_s >= (_SAY_S if waited_s < _SAY_LATER_S else _SAY_LATER_S):
            self._said_s = now_s
            self._owner.say(_awaited_text(len(fleet.nodes) - coming, coming, fleet.missing, text))

    def _news(self, body: NodesAwaited) -> None:
        if body != self._awaited:
            self._awaited = body
            self._owner.tell(body)


def _awaited_text(there: int, coming: int, missing: int, shortage: str) -> str:
    """Format a line such as "waiting for nodes: 2 are up, 1 is starting, 1 has no machine: ..."."""
    parts = [f"{there} {_are(there)} up"]
    if coming:
        parts.append(f"{coming} {_are(coming)} starting")
    if missing:
        parts.append(f"{missing} {'has' if missing == 1 else 'have'} no machine: {shortage}")
    return f"waiting for nodes: {', '.join(parts)}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"

"""The controller's loop: takes events from a queue and carries out the commands of ``decide``.

All decisions are made in ``lazarus.control``. The threads of the streams fill the queue; only the
loop's thread touches the state, the journal and the record.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from msgspec.structs import replace as changed

from lazarus.basics.clock import now_s
from lazarus.basics.threads import spawn
from lazarus.control.commit.commits import end, last_words
from lazarus.control.machine import decide
from lazarus.control.messages import (
    Body,
    ControllerFailed,
    Hello,
    Prepare,
    Pulse,
    Record,
    RunOver,
    ToDriver,
)
from lazarus.control.ports import (
    Command,
    Disconnect,
    DriverGone,
    DropFiles,
    Exit,
    Journal,
    Publish,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
    WriteManifest,
)
from lazarus.control.restart.replay import awakened
from lazarus.errors import ConfigError, LazarusError
from lazarus.record.ownership import owner_of
from lazarus.runtime.controller.chronicle import Chronicle
from lazarus.runtime.controller.controller_end import (
    Reserve,
    UnrecordedError,
    failure_of,
    unrecorded_end,
)
from lazarus.runtime.controller.manifests import ManifestWriter
from lazarus.runtime.controller.record_log import finite, line_of
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.controller.streams import Heard, Peer, Streams, tell_peer
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import add_control, bind, endpoint, make_server
from lazarus.runtime.spec import ControllerSpec

_TICK_S = 0.02
_MAX_STREAMS = 4096
_PULSE = codec.encode(ToDriver(Pulse()))


@dataclass(frozen=True, slots=True)
class _Died:
    """A thread of the controller died of an error, which ends the controller."""

    thread: str
    problem: BaseException


class Controller:
    """The controller, from the start of its process to its end. Create it by ``open_controller``.

    Args:
        spec: The controller's spec; with the port of an earlier controller after a restart.
        chronicle: Journal and record of the run.

    Raises:
        OSError: The port is not available.
    """

    def __init__(self, spec: ControllerSpec, chronicle: Chronicle) -> None:
        self._spec = spec
        self._chronicle = chronicle
        self._state = awakened(chronicle.journal_state.state, now_s=now_s())
        self._ended = chronicle.journal_state.end  # the journal's last entry, if the run has ended
        self._events: queue.SimpleQueue[Heard | _Died] = queue.SimpleQueue()
        self._streams = Streams(
            spec.config,
            term=self._state.term,
            post=self._events.put,
            on_death=self._thread_died,
            is_driver_dead=self._is_driver_dead,
        )
        self._done = False
        self._next_tick_s = self._next_pulse_s = now_s()
        self._waiting: int | None = None  # events to handle before a tick that is due
        self._is_orphan = False  # the driver was killed
        self._is_last_word = False  # the run's folder cannot be written: send events, then end
        self._reserve = Reserve(spec.run_dir / spec.journal)
        bind_host, timeouts = spec.bind_host or spec.host, spec.config.timeouts
        self._timeouts = timeouts
        self._store = RendezvousStore(
            spec.host, bind_host=bind_host, timeout_s=timeouts.collective_s
        )
        self._manifests = ManifestWriter(
            spec, lambda done: self._events.put((done, None)), on_death=self._thread_died
        )
        self._server = make_server(spec.credentials, max_streams=_MAX_STREAMS)
        add_control(self._server, attach=self._streams.attach, drive=self._streams.drive)
        self.port = bind(self._server, endpoint(bind_host, spec.port), spec.credentials)

    def _thread_died(self, name: str, problem: BaseException) -> None:
        self._events.put(_Died(name, problem))

    def _is_driver_dead(self) -> bool:
        """Whether the run's folder belongs to a process of this machine that has ended."""
        try:
            owner = owner_of(self._spec.run_dir)
        except (ConfigError, OSError):
            return False
        return owner is not None and owner.state == "gone"

    def orphaned(self) -> None:
        """Record the end of the run because the driver was killed.

        The process exits after ``timeouts.driver_away_s`` in any case.
        """
        self._is_orphan = True
        self._events.put((DriverGone(at_s=now_s()), None))
        last = threading.Timer(self._timeouts.driver_away_s, os._exit, (1,))
        last.daemon = True
        last.start()

    def begin(self) -> None:
        """Publish commits that an earlier controller only journaled, then take over the journal."""
        for command in self._chronicle.unsaid():
            self._publish(command)
        self._chronicle.begin(term=self._state.term, port=self.port)

    def _end_again(self, entry: Mapping[str, Any]) -> None:
        """Finish the end of a run whose controller died after it journaled the end."""
        event, told = last_words(entry)
        if self._chronicle.last_event != event.event:
            self._publish(event)
        self._carry_out(told)
        self._streams.driver_there.wait(self._timeouts.startup_s)
        self._carry_out(Exit())

    # ---- the one consumer ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the run is over.

        Raises:
            Exception: The error that ended the loop. The driver has been told; the process must
                end.
        """
        self._server.start()
        spawn("preparing", self._prepare_groups, on_death=self._thread_died)
        try:
            if self._ended is not None:
                self._end_again(self._ended)
            else:
                self._chronicle.fold()
            self._loop()
        except Exception as problem:
            self._streams.tell_driver(ControllerFailed(failure=failure_of(problem)))
            self._streams.hang_up()
            self._server.stop(grace=1.0).wait()
            raise
        self._server.stop(grace=2.0).wait()
        self._manifests.close()
        self._chronicle.close()
        self._reserve.release()

    def _prepare_groups(self) -> None:
        """Load the slow modules for building groups, in a thread, while the loop runs."""
        self._store.open()
        import_module("scipy.optimize")  # of the next plan

    def _loop(self) -> None:
        while not self._done:
            self._pulse()
            event, peer = self._next_event()
            if isinstance(event, WorkerSaid) and not self._hears(event, peer):
                continue
            state, commands = decide(self._state, event)
            if peer is not None and isinstance(event, WorkerSaid) and isinstance(event.body, Hello):
                commands = self._admit(event.worker, peer, commands)
            try:
                for command in commands:
                    self._carry_out(command)
            except UnrecordedError as problem:
                self._end_unrecorded(problem)
                return
            self._state = state
            self._chronicle.tidy()

    def _hears(self, event: WorkerSaid, peer: Peer | None) -> bool:
        """Whether to handle a worker's message: a hello, or any message of an admitted stream."""
        return peer is None or peer.is_heard or isinstance(event.body, Hello)

    def _admit(self, name: str, peer: Peer, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        """Admit a stream after its hello, or close it if ``commands`` disconnect the worker.

        Returns:
            The commands that remain. A refusal is sent to this stream here, because the worker's
            name may have another, admitted stream.
        """
        if Disconnect(worker=name) not in commands:
            self._streams.admit(name, peer)
            return commands
        for command in commands:
            if isinstance(command, Tell) and command.worker == name:
                tell_peer(peer, command.body, term=self._state.term)
        peer.close()
        return tuple(c for c in commands if not isinstance(c, Tell | Disconnect))

    def _next_event(self) -> Heard:
        """The next event of the queue, or a ``Tick`` when one is due.

        When a tick is due, the events that are queued at that moment come first, so that a message
        that arrived in time is not taken for late. Later events come after the tick, so that a
        flood of events cannot delay it for ever.
        """
        wait_s = self._next_tick_s - now_s()
        if wait_s <= 0 and self._waiting is None:
            self._waiting = self._events.qsize()
        if wait_s > 0 or self._waiting:
            self._waiting = self._waiting - 1 if self._waiting else None
            with suppress(queue.Empty):
                return self._of(self._events.get(timeout=max(0.0, wait_s)))
        late_s = now_s() - self._next_tick_s
        self._waiting, self._next_tick_s = None, now_s() + _TICK_S
        slept_s = late_s if late_s > self._timeouts.nap_s else 0.0
        return Tick(at_s=now_s(), slept_s=slept_s), None

    def _of(self, item: Heard | _Died) -> Heard:
        if isinstance(item, _Died):
            raise LazarusError(f"thread {item.thread} died") from item.problem
        return item

    def _pulse(self) -> None:
        """Send the driver a pulse if one is due, to show that this loop is not hung."""
        if now_s() < self._next_pulse_s:
            return
        self._next_pulse_s = now_s() + self._timeouts.pulse_interval_s
        self._streams.pulse(_PULSE)

    def _end_unrecorded(self, problem: UnrecordedError) -> None:
        """End the run because the journal or record cannot be written, and tell all peers."""
        self._is_last_word = True
        self._reserve.release()
        self._streams.driver_there.wait(self._timeouts.driver_away_s)
        status, failure = unrecorded_end(self._state, problem)
        state = replace(self._state, committed=replace(self._state.committed, known={}))
        self._state, commands = end(state, status=status, failure=failure, at_s=now_s())
        for command in commands:
            with suppress(UnrecordedError):
                self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Tell(worker=worker, body=body):
                self._tell(worker, body)
            case TellDriver(body=body):
                self._tell_driver(body)
            case Journal(entry=entry):
                self._chronicle.note(entry)
            case Publish():
                self._publish(command)
            case WriteManifest() | DropFiles():
                self._manifests.order(command)
            case Disconnect(worker=worker):
                self._streams.disconnect(worker)
            case Exit():
                self._done = True
                if not self._is_orphan:  # a driver that is reconnecting must not miss the end
                    self._streams.driver_there.wait(self._timeouts.driver_away_s)
                self._streams.hang_up()

    def _tell(self, worker: str, body: Body) -> None:
        if isinstance(body, Prepare):
            body = changed(body, store=self._store.address)
        self._streams.tell(worker, body, term=self._state.term)

    def _tell_driver(self, body: Body) -> None:
        if isinstance(body, RunOver):
            result = {**json.loads(body.result), **self._chronicle.figures()}
            body = changed(body, result=json.dumps(finite(result)))
        self._streams.tell_driver(body)

    def _publish(self, command: Publish) -> None:
        event = self._chronicle.event_of(command)
        try:
            self._chronicle.say(event)
        except UnrecordedError:
            if not self._is_last_word:
                raise
        self._tell_driver(Record(line=line_of(event)))


def open_controller(spec: ControllerSpec) -> Controller:
    """Create a controller that listens: the first of a run, or one that continues its journal.

    Raises:
        OSError: The port of the earlier controller is not available.
        JournalError, RecordError: The existing journal or record is damaged.
    """
    chronicle = Chronicle(spec)
    controller = Controller(
        replace(spec, port=spec.port or chronicle.journal_state.port), chronicle
    )
    controller.begin()
    return controller


def start_controller(
    spec: ControllerSpec, on_bound: Callable[[int], None], *, is_orphan: Callable[[], bool]
) -> None:
    """Run the controller in this process until the run is over.

    Args:
        spec: The controller's spec.
        on_bound: Called with the port once the controller listens.
        is_orphan: Says whether the driver is gone; called on SIGTERM.
    """
    controller = open_controller(spec)

    def terminated(*_: object) -> None:
        if not is_orphan():
            os._exit(1)  # SIGTERM from outside, or a dead fork server: the driver starts another
        controller.orphaned()

    signal.signal(signal.SIGTERM, terminated)
    on_bound(controller.port)
    controller.run()

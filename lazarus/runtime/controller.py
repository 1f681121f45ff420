"""The controller's shell: one event queue, one consumer, one ``decide``; it carries out commands.

It decides nothing. Streams feed the queue; the consumer alone owns the state, the journal and the
record.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec.structs import replace as changed

from lazarus import metrics
from lazarus.clock import RunClock, now_s
from lazarus.control.commits import end, last_words
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
    Exit,
    Journal,
    Publish,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
    WriteManifest,
)
from lazarus.control.replay import missing_commits, resumed_state
from lazarus.control.state import Control
from lazarus.errors import LazarusError
from lazarus.events import FILE_NAME, moment
from lazarus.journals import read_journal
from lazarus.runtime import journal as journaling
from lazarus.runtime.controller_end import (
    Reserve,
    UnrecordedError,
    failure_of,
    recording,
    unrecorded_end,
)
from lazarus.runtime.groups import RendezvousStore
from lazarus.runtime.manifests import ManifestWriter
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import add_control, bind, endpoint, make_server
from lazarus.runtime.spec import ControllerSpec
from lazarus.runtime.streams import Heard, Peer, Streams, tell_peer

_TICK_S = 0.02
_PULSE = codec.encode(ToDriver(Pulse()))


@dataclass(frozen=True, slots=True)
class _Died:
    """A thread of the controller ended with an error: so does the controller."""

    thread: str
    problem: BaseException


class RecordLog:
    """events.jsonl: one writer, one object a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.events = _earlier(path)
        self._out = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    @property
    def last_m(self) -> float:
        """Of the newest line; 0 where there is none."""
        return moment(self.events[-1]) if self.events else 0.0

    def append(self, event: dict[str, Any]) -> None:
        """Write an event whole or not at all; it counts as said in any case.

        Raises:
            OSError: It is not written.
        """
        self.events.append(event)
        left = memoryview((line_of(event) + "\n").encode())
        try:
            while left:
                left = left[self._out.write(left) :]
        except OSError:
            os.truncate(self._out.fileno(), self._size)
            raise
        self._size = os.fstat(self._out.fileno()).st_size

    def close(self) -> None:
        self._out.close()


def line_of(event: dict[str, Any]) -> str:
    """An event as a record has it."""
    return json.dumps(event, separators=(",", ":"), allow_nan=False)


def _earlier(path: Path) -> list[dict[str, Any]]:
    """What an earlier life wrote; half a last line is cut off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if len(whole) != len(text):
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


class Controller:
    """One life of the controller process."""

    def __init__(
        self,
        spec: ControllerSpec,
        state: Control,
        journal: journaling.Journal,
        *,
        log: RecordLog,
        clock: RunClock,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._state = state
        self._journal = journal
        self._events: queue.SimpleQueue[Heard | _Died] = queue.SimpleQueue()
        self._streams = Streams(spec.config, post=self._events.put, on_death=self._thread_died)
        self._ended: Mapping[str, Any] | None = None  # how an earlier life ended the run
        self._done = False
        self._next_tick_s = self._next_pulse_s = now_s()
        self._waiting: int | None = None  # messages to hear before the tick that is due
        self._is_last_word = False  # nothing can be written: say it, then end
        self._reserve = Reserve(spec.run_dir / spec.journal)
        stall_s, bind_host = spec.config.tolerated_stall_s, spec.bind_host or spec.host
        self._store = RendezvousStore(spec.host, bind_host=bind_host, timeout_s=30 * stall_s)
        self._log = log
        self._manifests = ManifestWriter(
            spec, lambda done: self._events.put((done, None)), on_death=self._thread_died
        )
        self._server = make_server(spec.credentials, max_streams=spec.max_streams)
        add_control(self._server, attach=self._streams.attach, drive=self._streams.drive)
        self.port = bind(self._server, endpoint(bind_host, spec.port), spec.credentials)

    def _thread_died(self, name: str, problem: BaseException) -> None:
        self._events.put(_Died(name, problem))

    def orphaned(self) -> None:
        """The driver was killed: record the end, if that takes no longer than a stall."""
        self._events.put((DriverGone(at_s=now_s()), None))
        last = threading.Timer(self._spec.config.tolerated_stall_s, os._exit, (1,))
        last.daemon = True
        last.start()

    def catch_up(self, entries: list[dict[str, Any]]) -> None:
        """Publish what an earlier life journaled and did not get to say."""
        self._ended = next((e for e in reversed(entries) if e["kind"] == "end"), None)
        if not self._state.resumed:
            return
        life = metrics.lives(self._log.events)[-1]
        said = {(event["event"], event.get("step")) for event in life}
        last = max(metrics.committed_steps(life), default=0)
        # One step further back: its ledger may be missing though its commit is said.
        missing = missing_commits(entries, self._spec.config, published=last - 1, now_s=now_s())
        for command in missing:
            if (command.event, command.fields["step"]) not in said:
                self._publish(command)

    def _end_again(self, entry: Mapping[str, Any]) -> None:
        """An earlier life died while it ended the run: say what it may not have said."""
        event, told = last_words(entry)
        if not self._log.events or self._log.events[-1]["event"] != event.event:
            self._publish(event)
        self._carry_out(told)
        self._streams.driver_there.wait(self._spec.config.start_timeout_s)
        self._carry_out(Exit())

    # ---- the one consumer ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the run is over.

        Raises:
            Exception: Whatever this loop died of; the driver has been told. The process must end.
        """
        self._server.start()
        try:
            if self._ended is not None:
                self._end_again(self._ended)
            self._loop()
        except Exception as problem:
            self._streams.tell_driver(ControllerFailed(failure=failure_of(problem)))
            self._streams.hang_up()
            self._server.stop(grace=1.0).wait()
            raise
        self._server.stop(grace=2.0).wait()
        self._manifests.close()
        self._log.close()
        self._reserve.release()

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

    def _hears(self, event: WorkerSaid, peer: Peer | None) -> bool:
        """Whether this stream may speak for the worker: with its hello, or once admitted."""
        return peer is None or peer.is_heard or isinstance(event.body, Hello)

    def _admit(self, name: str, peer: Peer, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        """Make a stream the worker's, or close it, as was decided of its hello.

        Returns:
            What is left to carry out: a refusal concerns this stream alone, not another of that
            name.
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
        """What came in, or that time has passed: however much comes in, time passes too.

        What waits when a tick is due is heard first, so that nobody is late who spoke in time.
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
        slept_s = late_s if late_s > self._spec.config.nap_s else 0.0
        return Tick(at_s=now_s(), slept_s=slept_s), None

    def _of(self, item: Heard | _Died) -> Heard:
        if isinstance(item, _Died):
            raise LazarusError(f"thread {item.thread} died") from item.problem
        return item

    def _pulse(self) -> None:
        """Tell the driver that this loop turns."""
        if now_s() < self._next_pulse_s:
            return
        self._next_pulse_s = now_s() + self._spec.config.pulse_s
        self._streams.pulse(_PULSE)

    def _end_unrecorded(self, problem: UnrecordedError) -> None:
        """What is decided from here on cannot be kept: end the run, and tell whoever hears it."""
        self._is_last_word = True
        self._reserve.release()
        self._streams.driver_there.wait(self._spec.config.tolerated_stall_s)
        status, failure = unrecorded_end(self._state, problem)
        state = replace(self._state, known={})
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
                with recording(self._spec.run_dir):
                    self._journal.append(entry)
            case Publish():
                self._publish(command)
            case WriteManifest():
                self._manifests.order(command)
            case Disconnect(worker=worker):
                self._streams.disconnect(worker)
            case Exit():
                self._done = True
                self._streams.hang_up()

    def _tell(self, worker: str, body: Body) -> None:
        if isinstance(body, Prepare):
            body = changed(body, store=self._store.address)
        self._streams.tell(worker, body, term=self._state.term)

    def _tell_driver(self, body: Body) -> None:
        if isinstance(body, RunOver):
            last = self._log.events[-1]
            totals = {name: last[name] for name in ("goodput_tokens_per_s", "ettr", "plt")}
            result = {**json.loads(body.result), **totals}
            body = changed(body, result=json.dumps(_finite(result)))
        self._streams.tell_driver(body)

    def _publish(self, command: Publish) -> None:
        event = {**self._clock.stamp(command.t), "event": command.event, **command.fields}
        if command.event == "run_finished":
            event["wall_s"] = command.t - self._clock.zero_s
            event = {**run_totals([*self._log.events, event]), **event}
        event = _finite(event)
        try:
            with recording(self._spec.run_dir):
                self._log.append(event)
        except UnrecordedError:
            if not self._is_last_word:
                raise
        self._tell_driver(Record(line=line_of(event)))


def run_totals(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last event of a record says of the whole run."""
    return {
        "goodput_tokens_per_s": metrics.goodput(events),
        "ettr": metrics.ettr(events),
        "plt": metrics.plt(events),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def open_controller(spec: ControllerSpec) -> Controller:
    """A controller that listens: a first life, or one that reads its journal.

    Raises:
        OSError: The port of the earlier life is not to be had.
    """
    folder = spec.run_dir / spec.journal
    entries = read_journal(folder) if folder.exists() else []
    journal = journaling.Journal(folder)
    if not entries:
        journal.append({"kind": "header", "run": spec.run_id, "format": 1})
    state = resumed_state(entries, spec.config, now_s=now_s())
    log = RecordLog(spec.run_dir / FILE_NAME)
    newest_term = next((e for e in reversed(entries) if e["kind"] == "term"), None)
    clock = RunClock.going_on(since=newest_term, last_m=log.last_m)
    port = spec.port or next((int(e["port"]) for e in entries if e["kind"] == "term"), 0)
    controller = Controller(replace(spec, port=port), state, journal, log=log, clock=clock)
    controller.catch_up(entries)
    who = {"term": state.term, "port": controller.port, "pid": os.getpid()}
    journal.append({"kind": "term", **who, **clock.noted()})
    return controller


def start_controller(spec: ControllerSpec, on_bound: Callable[[int], None]) -> None:
    """Entry point of the controller's own process."""
    parent = os.getppid()
    controller = open_controller(spec)

    def terminated(*_: object) -> None:
        if os.getppid() == parent:
            os._exit(1)  # by somebody: the driver starts another one
        controller.orphaned()

    signal.signal(signal.SIGTERM, terminated)
    on_bound(controller.port)
    controller.run()

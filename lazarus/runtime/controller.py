"""The controller's shell: one event queue, one consumer, one ``decide``; it carries out commands.

It decides nothing. Streams feed the queue; the consumer alone owns the state, the journal and the
record.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace as changed

from lazarus import metrics
from lazarus.clock import RunClock, now_s
from lazarus.control.commits import end, last_words
from lazarus.control.machine import decide
from lazarus.control.messages import (
    Body,
    ControllerFailed,
    DriverHello,
    FromDriver,
    FromWorker,
    Hello,
    Prepare,
    Pulse,
    Record,
    RunOver,
    ToDriver,
    ToWorker,
)
from lazarus.control.ports import (
    Command,
    Disconnect,
    DriverGone,
    DriverSaid,
    Event,
    Exit,
    Journal,
    Publish,
    StreamClosed,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
    WriteManifest,
)
from lazarus.control.replay import missing_commits, resumed_state
from lazarus.control.state import Control
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

_TICK_S = 0.02
_PULSE = codec.encode(ToDriver(Pulse()))


class _Peer:
    """The outgoing half of one stream."""

    def __init__(self) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def messages(self) -> Iterator[bytes]:
        while (message := self.outbox.get()) is not None:
            yield message


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
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._driver: _Peer | None = None
        self._for_driver: list[bytes] = []  # until it is (back) there
        self._driver_there = threading.Event()
        self._ended: Mapping[str, Any] | None = None  # how an earlier life ended the run
        self._done = False
        self._next_tick_s = self._next_pulse_s = now_s()
        self._waiting: int | None = None  # messages to hear before the tick that is due
        self._is_last_word = False  # nothing can be written: say it, then end
        self._reserve = Reserve(spec.run_dir / spec.journal)
        self.last_stream_error = ""  # how the newest broken stream broke
        stall_s, bind_host = spec.config.tolerated_stall_s, spec.bind_host or spec.host
        self._store = RendezvousStore(spec.host, bind_host=bind_host, timeout_s=30 * stall_s)
        self._log = log
        self._manifests = ManifestWriter(spec, self._events.put)
        self._server = make_server(spec.credentials, max_streams=spec.max_streams)
        add_control(self._server, attach=self._attach, drive=self._drive)
        self.port = bind(self._server, endpoint(bind_host, spec.port), spec.credentials)

    # ---- streams -------------------------------------------------------------------------------

    def _attach(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer a worker's stream: its hello says who speaks."""
        first = codec.decode(FromWorker, next(requests)).body
        assert isinstance(first, Hello)
        peer, name = _Peer(), first.worker
        with self._lock:
            older, self._peers[name] = self._peers.get(name), peer
        if older is not None:
            older.outbox.put(None)  # one stream per worker and term (rule 37)
        return self._answer(name, first, requests, context, peer=peer, driver=False)

    def _drive(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer the driver's stream."""
        first = codec.decode(FromDriver, next(requests)).body
        assert isinstance(first, DriverHello)
        peer = _Peer()
        with self._lock:
            self._driver = peer
            for message in self._for_driver:
                peer.outbox.put(message)
            self._for_driver.clear()
        self._driver_there.set()
        return self._answer("", first, requests, context, peer=peer, driver=True)

    def _answer(
        self,
        name: str,
        first: Body,
        requests: Iterator[bytes],
        context: Any,
        *,
        peer: _Peer,
        driver: bool,
    ) -> Iterator[bytes]:
        context.add_callback(lambda: peer.outbox.put(None))
        self._post(name, first, driver=driver)
        reader = threading.Thread(
            target=self._read, args=(requests, name, peer, driver), name=f"read-{name}", daemon=True
        )
        reader.start()
        return peer.messages()

    def _read(self, requests: Iterator[bytes], name: str, peer: _Peer, driver: bool) -> None:
        kind: type[FromDriver] | type[FromWorker] = FromDriver if driver else FromWorker
        try:
            for data in requests:
                self._post(name, codec.decode(kind, data).body, driver=driver)
        except Exception as problem:  # noqa: BLE001 - grpc raises private types when a peer dies
            self.last_stream_error = f"{name}: {problem}"
        finally:
            peer.outbox.put(None)
            self._closed(name, peer, driver=driver)

    def _post(self, name: str, body: Body, *, driver: bool) -> None:
        now = now_s()
        event: Event = (
            DriverSaid(body=body, at_s=now)
            if driver
            else WorkerSaid(worker=name, body=body, at_s=now)
        )
        self._events.put(event)

    def _closed(self, name: str, peer: _Peer, *, driver: bool) -> None:
        if driver:
            if self._driver is peer:
                self._events.put(DriverGone(at_s=now_s()))
            return
        with self._lock:
            current = self._peers.get(name) is peer
            if current:
                del self._peers[name]
        if current:
            self._events.put(StreamClosed(worker=name, at_s=now_s()))

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
        self._driver_there.wait(self._spec.config.start_timeout_s)
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
            with self._lock:
                if self._driver is not None:
                    last = ToDriver(ControllerFailed(failure=failure_of(problem)))
                    self._driver.outbox.put(codec.encode(last))
            self._hang_up()
            self._server.stop(grace=1.0).wait()
            raise
        self._server.stop(grace=2.0).wait()
        self._manifests.close()
        self._log.close()
        self._reserve.release()

    def _loop(self) -> None:
        while not self._done:
            self._pulse()
            state, commands = decide(self._state, self._next_event())
            try:
                for command in commands:
                    self._carry_out(command)
            except UnrecordedError as problem:
                self._end_unrecorded(problem)
                return
            self._state = state

    def _next_event(self) -> Event:
        """What came in, or that time has passed: however much comes in, time passes too.

        What waits when a tick is due is heard first, so that nobody is late who spoke in time.
        """
        wait_s = self._next_tick_s - now_s()
        if wait_s <= 0 and self._waiting is None:
            self._waiting = self._events.qsize()
        if wait_s > 0 or self._waiting:
            self._waiting = self._waiting - 1 if self._waiting else None
            with suppress(queue.Empty):
                return self._events.get(timeout=max(0.0, wait_s))
        late_s = now_s() - self._next_tick_s
        self._waiting, self._next_tick_s = None, now_s() + _TICK_S
        return Tick(at_s=now_s(), slept_s=late_s if late_s > self._spec.config.nap_s else 0.0)

    def _pulse(self) -> None:
        """Tell the driver that this loop turns."""
        if now_s() < self._next_pulse_s:
            return
        self._next_pulse_s = now_s() + self._spec.config.pulse_s
        with self._lock:
            if self._driver is not None:
                self._driver.outbox.put(_PULSE)

    def _end_unrecorded(self, problem: UnrecordedError) -> None:
        """What is decided from here on cannot be kept: end the run, and tell whoever hears it."""
        self._is_last_word = True
        self._reserve.release()
        self._driver_there.wait(self._spec.config.tolerated_stall_s)
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
                with self._lock:
                    peer = self._peers.get(worker)
                if peer is not None:
                    peer.outbox.put(None)
            case Exit():
                self._done = True
                self._hang_up()

    def _hang_up(self) -> None:
        """End every stream, behind what is queued in it."""
        with self._lock:
            peers = [*self._peers.values(), *([] if self._driver is None else [self._driver])]
        for peer in peers:
            peer.outbox.put(None)

    def _tell(self, worker: str, body: Body) -> None:
        with self._lock:
            peer = self._peers.get(worker)
        if peer is None:
            return  # its stream is closed; the event for that is on its way
        if isinstance(body, Prepare):
            body = changed(body, store=self._store.address)
        peer.outbox.put(codec.encode(ToWorker(cast(Any, body), term=self._state.term)))

    def _tell_driver(self, body: Body) -> None:
        if isinstance(body, RunOver):
            last = self._log.events[-1]
            totals = {name: last[name] for name in ("goodput_tokens_per_s", "ettr", "plt")}
            result = {**json.loads(body.result), **totals}
            body = changed(body, result=json.dumps(_finite(result)))
        message = codec.encode(ToDriver(cast(Any, body)))
        with self._lock:
            if self._driver is not None:
                self._driver.outbox.put(message)
            else:
                self._for_driver.append(message)

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
    controller = open_controller(spec)
    on_bound(controller.port)
    controller.run()

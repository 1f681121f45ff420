"""The driver's stream: what breaks is waited for, and what a broken stream lost is said again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from lazarus.basics.threads import say_so
from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.messages import DriverHello, FromDriver, StartNode, StopRun, ToDriver
from lazarus.control.ports import DriverGone, DriverSaid
from lazarus.runtime.controller.streams import Heard, Streams
from lazarus.runtime.rpc import codec

TERM = 3


class Line:
    """One stream of a driver, as gRPC hands it to the controller."""

    def __init__(self, streams: Streams, *, heard: tuple[int, int] = (0, 0)) -> None:
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.say(DriverHello(run="r", term=heard[0], heard=heard[1]))
        self._answers = streams.drive(self._requests(), self)

    def say(self, body: DriverHello | StopRun) -> None:
        self._said.put(codec.encode(FromDriver(body)))

    def breaks(self) -> None:
        self._said.put(None)

    def ends(self) -> None:
        self._said.put(b"")

    def hears(self) -> ToDriver:
        return codec.decode(ToDriver, next(self._answers))

    def is_over(self) -> bool:
        return next(self._answers, None) is None

    def _requests(self) -> Iterator[bytes]:
        while (said := self._said.get()) != b"":
            if said is None:
                raise grpc.RpcError
            yield said

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True


Desk = tuple[Streams, "queue.SimpleQueue[Heard]", threading.Event]


@pytest.fixture
def desk() -> Desk:
    """Streams that wait for 0.5 s, their events, and whether the driver's process has ended."""
    events: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    dead = threading.Event()
    streams = Streams(
        ControlConfig(steps=3, timeouts=derive_timeouts(0.5)),
        term=TERM,
        post=events.put,
        on_death=say_so,
        is_driver_dead=dead.is_set,
    )
    return streams, events, dead


def said(events: queue.SimpleQueue[Heard]) -> object:
    event, _ = events.get(timeout=20)
    return event.body if isinstance(event, DriverSaid) else event


def test_what_a_broken_stream_lost_is_said_again_and_nothing_twice(desk: Desk) -> None:
    streams, events, _ = desk
    streams.tell_driver(StartNode())  # before there is a driver
    line = Line(streams)
    assert line.hears() == ToDriver(StartNode(), term=TERM, number=1)
    for _ in range(3):
        streams.tell_driver(StartNode())
    assert line.hears().number == 2  # 3 and 4 are lost with the stream
    line.breaks()
    again = Line(streams, heard=(TERM, 2))
    assert [again.hears().number for _ in range(2)] == [3, 4]
    streams.tell_driver(StartNode(is_extra=True))
    assert again.hears() == ToDriver(StartNode(is_extra=True), term=TERM, number=5)
    assert isinstance(said(events), DriverHello) and isinstance(said(events), DriverHello)
    again.say(StopRun())
    assert isinstance(said(events), StopRun), "the break ended nothing"


def test_of_an_older_controller_nothing_counts_as_heard(desk: Desk) -> None:
    streams, _, _ = desk
    streams.tell_driver(StartNode())
    assert Line(streams, heard=(TERM - 1, 70)).hears().number == 1


def test_a_driver_that_stays_away_is_gone_after_its_bound(desk: Desk) -> None:
    streams, events, _ = desk
    line = Line(streams)
    line.breaks()
    assert isinstance(said(events), DriverHello)
    assert isinstance(said(events), DriverGone)
    assert streams.driver_there.is_set(), "nobody waits for it any more"


@pytest.mark.parametrize("how", ["ends its stream", "is dead"])
def test_a_driver_that_will_not_be_back_is_not_waited_for(how: str, desk: Desk) -> None:
    streams, events, dead = desk
    waited = threading.Event()
    streams.driver_there.wait = lambda timeout=None: waited.set() or False  # type: ignore[method-assign,assignment]
    line = Line(streams)
    if how == "is dead":
        dead.set()
        line.breaks()
    else:
        line.ends()
    assert isinstance(said(events), DriverHello)
    assert isinstance(said(events), DriverGone)
    assert waited.is_set() == (how == "is dead")


def test_a_stream_that_was_followed_by_another_ends_without_a_word(desk: Desk) -> None:
    streams, events, _ = desk
    first = Line(streams)
    second = Line(streams)
    assert first.is_over()
    first.breaks()
    assert isinstance(said(events), DriverHello) and isinstance(said(events), DriverHello)
    second.say(StopRun())
    assert isinstance(said(events), StopRun)

"""Starting nodes in threads: nobody waits, what fails is tried elsewhere, what comes late goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from fleet_limits import limits

from lazarus.control.cluster.replacing import Limits, Machine
from lazarus.control.messages import Body, MachineJudged, NodesAwaited
from lazarus.errors import RoomTakenError, StartupError
from lazarus.runtime.driver.nodes import Nodes

SOON_S = 30.0


class Here:
    """A launcher with one room on each of its machines, and the owner of what runs there."""

    def __init__(self, *machines: str, limits: Limits) -> None:
        self.free = dict.fromkeys(machines, 1)
        self.homes: dict[str, str] = {}
        self.work: dict[str, Callable[[str], None]] = {}  # what a start on a machine does
        self.down: list[str] = []
        self.told: list[Body] = []
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.nodes = Nodes(self, self, limits)  # type: ignore[arg-type]

    def until(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, SOON_S)

    # a launcher
    def machines(self) -> tuple[Machine, ...]:
        with self.changed:
            return tuple(Machine(id=id, room=room) for id, room in self.free.items())

    def name_of(self, machine: str) -> str:
        return f"machine {machine}"

    def shortage(self) -> str:
        return "no machine is free"

    def add_machine(self) -> None:
        pass

    # an owner
    def bring_up(self, key: str, machine: str) -> None:
        with self.changed:
            self.free[machine] -= 1
            self.homes[key] = machine
            self.changed.notify_all()
        if (work := self.work.get(machine)) is not None:
            work(key)

    def take_down(self, key: str) -> None:
        with self.changed:
            self.down.append(key)
            if (machine := self.homes.pop(key, None)) is not None:
                self.free[machine] += 1
            self.changed.notify_all()

    def tell(self, body: Body) -> None:
        with self.changed:
            self.told.append(body)
            self.changed.notify_all()

    def say(self, text: str) -> None:
        with self.changed:
            self.lines.append(text)
            self.changed.notify_all()

    def thread_died(self, name: str, problem: BaseException) -> None:
        raise AssertionError(f"{name}: {problem}")


Make = Callable[..., Here]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Here] = []

    def go(*machines: str, wanted: int, **given: object) -> Here:
        here = Here(*machines, limits=limits(wanted=wanted, **given))
        made.append(here)
        return here

    yield go
    for here in made:
        here.nodes.close()


def test_a_start_that_fails_is_tried_elsewhere_at_once(make: Make) -> None:
    """R3, R7: every failed start is a failed start, and says so."""

    def fail(key: str) -> None:
        raise StartupError("ActorUnschedulableError: its machine is gone")

    here = make("a", "b", wanted=1)
    here.work = {"a": fail, "b": fail}
    here.nodes.start()
    here.until(lambda: len(here.down) >= 2)
    assert set(here.down) == {"node-0", "node-1"}, "one start on each machine, then both rest"
    assert all("ActorUnschedulableError" in line for line in here.lines[:2])
    here.until(lambda: isinstance(here.told[-1], NodesAwaited) and here.told[-1].is_troubled)
    assert here.told[-1].reason.endswith("no machine is free")  # type: ignore[attr-defined]


def test_a_start_that_hangs_keeps_nobody_waiting_and_is_taken_down_when_it_ends(
    make: Make,
) -> None:
    """R3: the loop that hears of deaths and starts others never waits for a machine."""
    stuck = threading.Event()

    def hang(key: str) -> None:
        stuck.wait(SOON_S)

    here = make("slow", "b", "c", wanted=2, start_s=1.0)
    here.work = {"slow": hang, "b": here.nodes.came_up, "c": here.nodes.came_up}
    here.nodes.start()
    here.until(lambda: {"b", "c"} <= set(here.homes.values()))
    here.until(lambda: "slow" not in here.homes.values())
    before = len(here.down)
    stuck.set()  # it comes up after all, and is not wanted any more
    here.until(lambda: len(here.down) > before)


def test_room_that_was_taken_meanwhile_is_looked_for_elsewhere_without_blame(make: Make) -> None:
    """R1: another run was quicker."""

    def taken(key: str) -> None:
        here.free["a"] = -1  # none is left after this one gave its own back
        raise RoomTakenError("a has no room any more")

    here = make("a", wanted=1)
    here.work = {"a": taken}
    here.nodes.start()
    here.until(lambda: here.down == ["node-0"])
    with here.changed:
        here.free = {"a": 0, "b": 1}
    here.until(lambda: "b" in here.homes.values())
    assert not any("did not start" in line for line in here.lines)


def test_a_machine_where_nodes_die_again_and_again_is_reported(make: Make) -> None:
    here = make("a", wanted=1, rest_s=0.001)
    here.nodes.start()
    for number in range(6):
        here.until(lambda n=number: f"node-{n}" in here.homes)  # type: ignore[misc]
        here.nodes.came_up(f"node-{number}")
        here.take_down(f"node-{number}")
        here.nodes.died(f"node-{number}", cause="SIGKILL")
        here.nodes.lost(f"node-{number}", cause="stream closed", is_silent=False)
    here.until(lambda: any(isinstance(b, MachineJudged) and b.is_banned for b in here.told))
    (banned,) = [b for b in here.told if isinstance(b, MachineJudged) and b.is_banned]
    assert banned.machine == "machine a" and "SIGKILL" in banned.reason


def test_one_more_node_is_named_or_refused_with_a_reason(make: Make) -> None:
    here = make("a", "b", wanted=1)
    here.nodes.start()
    here.until(lambda: len(here.homes) == 1)
    assert here.nodes.one_more().result(SOON_S) == "node-1"
    refused: Future[str] = here.nodes.one_more()
    with pytest.raises(StartupError, match="no machine is free"):
        refused.result(SOON_S)


def test_after_the_end_nothing_is_started_and_what_was_starting_is_taken_down(make: Make) -> None:
    here = make("a", wanted=1)
    here.nodes.start()
    here.until(lambda: bool(here.homes))
    here.nodes.enough()
    here.nodes.close()
    assert here.down == ["node-0"]
    assert here.free == {"a": 1}

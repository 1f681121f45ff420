"""When a controller that died is started again, and when its silence means that it hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import ControlConfig
from lazarus.errors import ControllerDiedError, StartupError
from lazarus.failure import Cause, Failure
from lazarus.runtime.driver.controller_life import ControllerLife
from lazarus.runtime.driver.restarts import MAX_DEATHS, Again, GiveUp, PulseWatch, Restarts
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.spec import ControllerSpec

STALL_S = 10.0


def deaths(*errors: str, lived_s: float = 1.0, on_purpose: bool = False) -> list[Again | GiveUp]:
    restarts, now_s, answers = (
        Restarts(settled_s=3 * STALL_S, pause_s=STALL_S),
        0.0,
        list[Again | GiveUp](),
    )
    for error in errors:
        restarts.born(now_s)
        now_s += lived_s
        answers.append(restarts.died(error, now_s, on_purpose=on_purpose))
    return answers


def test_pauses_grow_up_to_the_stall_and_then_it_is_given_up() -> None:
    *again, last = deaths(*[""] * MAX_DEATHS)
    pauses = [answer.pause_s for answer in again if isinstance(answer, Again)]
    assert pauses == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert isinstance(last, GiveUp) and str(MAX_DEATHS) in last.reason


def test_a_life_that_went_well_forgives_what_was_before() -> None:
    answers = deaths(*[""] * 50, lived_s=3 * STALL_S)
    assert answers == [Again(pause_s=0.0)] * 50


def test_what_the_driver_did_on_purpose_is_never_counted() -> None:
    assert deaths(*[""] * 50, on_purpose=True) == [Again(pause_s=0.0)] * 50


def test_the_same_exception_three_times_in_a_row_is_enough() -> None:
    assert [type(a) for a in deaths("ValueError: x", "ValueError: x", "ValueError: x")] == [
        Again,
        Again,
        GiveUp,
    ]
    assert GiveUp not in [type(a) for a in deaths("ValueError: x", "", "ValueError: x", "Key: y")]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(clock: Clock, hung: list[float]) -> PulseWatch:
    return PulseWatch(limit_s=10.0, on_hung=hung.append, on_death=fails, clock=clock)


def fails(name: str, problem: BaseException) -> None:
    raise AssertionError(f"thread {name}: {problem}")


def test_silence_beyond_the_limit_is_told_once() -> None:
    clock, hung = Clock(), list[float]()
    pulse = watch(clock, hung)
    pulse.heard()
    for second in range(1, 30):
        clock.now = float(second)
        if second <= 5:
            pulse.heard()
        pulse.look()
    assert hung == [pytest.approx(11.0)]


def test_nobody_is_watched_before_the_first_life_and_between_two() -> None:
    clock, hung = Clock(), list[float]()
    pulse = watch(clock, hung)
    for second in range(1, 30):
        clock.now = float(second)
        pulse.look()
    pulse.heard()
    pulse.gone()
    clock.now = 100.0
    pulse.look()
    assert not hung


def test_a_driver_that_itself_stood_still_blames_nobody() -> None:
    clock, hung = Clock(), list[float]()
    pulse = watch(clock, hung)
    pulse.heard()
    pulse.look()
    clock.now = 3600.0  # a laptop that slept
    pulse.look()
    assert not hung
    for _ in range(20):
        clock.now += 1.0
        pulse.look()
    assert len(hung) == 1


class FakeLauncher:
    """Starts nothing; ``starts`` says how each start after the first goes."""

    host = "127.0.0.1"

    def __init__(self, *starts: Callable[[], int]) -> None:
        self.starts, self.count, self.killed = list(starts), 0, list[str]()
        self.started = threading.Semaphore(0)

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        self.count += 1
        try:
            return self.starts.pop(0)() if self.starts else 4242
        finally:
            self.started.release()

    def kill(self, name: str) -> None:
        self.killed.append(name)


def life(launcher: Any, over: list[Failure]) -> ControllerLife:
    alive = ControllerLife(launcher, timeouts=derive_timeouts(0.5), on_over=over.append)
    spec = ControllerSpec(
        host="127.0.0.1",
        port=0,
        credentials=Credentials(secret="s"),
        run_dir=Path("/nowhere"),
        config=ControlConfig(steps=1),
    )
    assert alive.start(spec) == 4242
    assert launcher.started.acquire(timeout=10)
    return alive


def raises(problem: Exception) -> Callable[[], int]:
    def start() -> int:
        raise problem

    return start


def test_an_exception_that_comes_back_ends_the_run_with_its_traceback() -> None:
    launcher, over = FakeLauncher(), list[Failure]()
    alive = life(launcher, over)
    for _ in range(3):
        alive.failed(Failure(cause=Cause.INTERNAL, message="OverflowError: x", traceback="here"))
        alive.died("process exit code 1")
        if not over:
            assert launcher.started.acquire(timeout=10)
    (failure,) = over
    assert failure.cause is Cause.INTERNAL and failure.traceback == "here"
    assert failure.message == "the controller failed 3 times in a row in the same way: " + (
        "OverflowError: x"
    )
    alive.close()


def test_one_that_cannot_even_start_says_why() -> None:
    word = Failure(cause=Cause.STORAGE, message="OSError: no space").to_json()
    cannot = raises(ControllerDiedError("cannot start", failure=word))
    launcher, over = FakeLauncher(lambda: 4242, cannot, cannot, cannot), list[Failure]()
    alive = life(launcher, over)
    while not over:
        alive.died("process exit code 1")  # as the launcher tells of every end
        assert over or launcher.started.acquire(timeout=10)
    assert over[0].cause is Cause.STORAGE and "no space" in over[0].message
    alive.close()


def test_a_start_that_the_launcher_gives_up_counts_as_a_death() -> None:
    launcher = FakeLauncher(lambda: 4242, *[raises(StartupError("did not come up"))] * 20)
    over: list[Failure] = []
    ended = threading.Event()
    alive = life(launcher, over)
    alive._on_over = lambda failure: (over.append(failure), ended.set())
    alive.died("SIGKILL")
    assert ended.wait(30)
    assert launcher.count == MAX_DEATHS
    assert "did not come up" in over[0].message
    alive.close()


def test_a_hung_one_is_killed_by_name_and_the_end_says_so() -> None:
    launcher, over = FakeLauncher(), list[Failure]()
    alive = life(launcher, over)
    for _ in range(MAX_DEATHS):
        alive._end_hung(7.0)
        alive.died("SIGKILL")
        if not over:
            assert launcher.started.acquire(timeout=10)
    assert launcher.killed == ["controller"] * MAX_DEATHS
    assert "gave no sign for 7.0 s" in over[0].message
    alive.close()

"""Two clocks: what decisions and what people read, over the lives of a run and of a machine."""

from __future__ import annotations

import time

import pytest

from lazarus.basics import clock
from lazarus.basics.clock import RunClock, now_s


def test_seconds_alive_go_on_in_a_later_controller_on_this_machine() -> None:
    first = RunClock(zero_s=now_s() - 100.0)
    later = RunClock.going_on(since={"kind": "term", **first.noted()}, last_m=40.0)
    assert later.zero_s == first.zero_s
    assert later.stamp(now_s())["m"] == pytest.approx(100.0, abs=1.0)


@pytest.mark.parametrize("boot", ["another machine's", ""])
def test_after_a_reboot_they_go_on_behind_the_last_line(
    boot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monotonic clock started anew: no age is negative, and none is absurd."""
    monkeypatch.setattr(clock, "boot_id", lambda: boot and "this one's")
    ahead = {"kind": "term", "boot": boot, "zero_s": now_s() + 1e6, "began_m": 30.0}
    later = RunClock.going_on(since=ahead, last_m=40.0)
    assert later.stamp(now_s())["m"] == pytest.approx(40.0, abs=1.0)
    assert later.life_s(now_s()) == pytest.approx(10.0, abs=1.0)


def test_a_new_life_of_the_run_goes_on_behind_the_last_line() -> None:
    later = RunClock.going_on(since=None, last_m=1234.0)
    assert later.stamp(now_s())["m"] == pytest.approx(1234.0, abs=1.0)
    assert later.life_s(now_s()) == pytest.approx(0.0, abs=1.0)


def test_the_time_of_day_follows_the_wall_clock_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, at_s = RunClock(zero_s=now_s() - 10.0), now_s() - 1.0
    before, true_time = running.stamp(at_s), time.time
    assert before["t"] == pytest.approx(true_time() - 1.0, abs=0.5)
    monkeypatch.setattr(time, "time", lambda: true_time() - 3600.0)
    after = running.stamp(at_s)
    assert after["t"] - before["t"] == pytest.approx(-3600.0, abs=0.5)
    assert after["m"] == before["m"] == pytest.approx(9.0, abs=0.5)


def test_a_moment_of_another_machines_life_is_now() -> None:
    running = RunClock(zero_s=now_s())
    stamped = running.stamp(now_s() + 1e9)
    assert stamped["t"] == pytest.approx(time.time(), abs=1.0)
    assert stamped["m"] == pytest.approx(0.0, abs=1.0)

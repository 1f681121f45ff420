"""Where the two threads of a worker meet: a fence freezes the outcome, whatever the timing."""

from __future__ import annotations

import threading

import pytest

from lazarus.control.messages import Report, Vector
from lazarus.errors import FencedError
from lazarus.runtime.fence.ledger import StepLedger


def vector(step: int, generation: int = 1) -> Vector:
    return Vector(generation=generation, step=step, lanes=bytes([step]))


def entered(generation: int = 1, committed: int = 0) -> StepLedger:
    ledger = StepLedger(committed=committed)
    assert ledger.raise_fence(generation, lambda: None) is not None
    assert ledger.enter(generation)
    return ledger


def test_a_decision_before_the_fence_is_in_the_report() -> None:
    ledger = entered()
    ledger.prepare(1)
    assert ledger.decide(vector(1))
    report = ledger.raise_fence(2, lambda: None)
    assert report == Report(generation=2, committed=1, prepared=1, vectors=(vector(1),), entered=1)


def test_a_decision_after_the_fence_is_thrown_away() -> None:
    ledger = entered()
    ledger.prepare(1)
    report = ledger.raise_fence(2, lambda: None)
    assert report == Report(generation=2, committed=0, prepared=1, entered=1)
    assert not ledger.decide(vector(1))
    assert ledger.decided == 0 and ledger.unacknowledged(above=0) == ()


def test_the_order_is_fence_then_release_then_report() -> None:
    ledger = entered()
    seen: list[tuple[int, bool]] = []
    ledger.raise_fence(2, lambda: seen.append((ledger.fence, ledger.decide(vector(1)))))
    assert seen == [(2, False)]


def test_an_older_or_equal_fence_changes_nothing() -> None:
    ledger = entered(generation=3)
    released: list[int] = []
    assert ledger.raise_fence(3, lambda: released.append(3)) is None
    assert ledger.raise_fence(2, lambda: released.append(2)) is None
    assert ledger.fence == 3 and not released


def test_a_generation_is_not_entered_behind_a_higher_fence() -> None:
    ledger = entered(generation=1)
    ledger.raise_fence(2, lambda: None)
    ledger.raise_fence(3, lambda: None)
    assert not ledger.enter(2)
    assert ledger.gen == 1
    with pytest.raises(FencedError):
        ledger.check()
    assert ledger.enter(3)
    ledger.check()


def test_vectors_are_kept_until_acknowledged_and_the_last_one_longer() -> None:
    ledger = entered()
    for step in (1, 2, 3):
        ledger.prepare(step)
        assert ledger.decide(vector(step))
        ledger.applied(step)
    ledger.acknowledge(2)
    assert [v.step for v in ledger.unacknowledged(above=0)] == [3]
    ledger.acknowledge(3)
    report = ledger.raise_fence(2, lambda: None)
    assert report is not None and report.vectors == (vector(3),)


def test_redo_withdraws_what_was_prepared() -> None:
    ledger = entered()
    ledger.prepare(1)
    ledger.withdraw()
    report = ledger.raise_fence(2, lambda: None)
    assert report is not None and report.prepared == report.committed == 0


def test_no_thread_timing_lets_a_decision_past_its_report() -> None:
    """1,000 races of decide against raise_fence: the report and the outcome always agree."""
    for generation in range(2, 1002):
        ledger = entered(generation=generation - 1)
        ledger.prepare(1)
        line = threading.Barrier(2)
        outcome: list[bool] = []

        def compute(
            ledger: StepLedger = ledger,
            line: threading.Barrier = line,
            outcome: list[bool] = outcome,
        ) -> None:
            line.wait()
            outcome.append(ledger.decide(vector(1)))

        thread = threading.Thread(target=compute)
        thread.start()
        line.wait()
        report = ledger.raise_fence(generation, lambda: None)
        thread.join()
        assert report is not None
        assert (report.committed == 1) == outcome[0] == (report.vectors == (vector(1),))

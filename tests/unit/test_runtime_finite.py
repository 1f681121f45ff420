"""Numbers that are none: losses, counts, gradients, rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lazarus import LossSum
from lazarus.control.vector import StepSums
from lazarus.errors import UserMistakeError
from lazarus.runtime.state.rates import Rates
from lazarus.runtime.training.finite import MOST_IN_A_ROW, FiniteWatch, check_total
from lazarus.runtime.training.step import checked_loss


def sums(step: int, *, loss: float = 1.0, count: float = 8.0, square: float = 1.0) -> StepSums:
    return StepSums(
        step=step,
        samples=4,
        count=count,
        sample_hash=0,
        loss_sum=loss,
        aux_sum=0.0,
        found_inf=not math.isfinite(loss),
        pause=False,
        times=(0.1,),
        counts=np.ones((1, 2)),
        squares=np.array([[square, 1.0]]),
    )


@pytest.mark.parametrize("count", [float("inf"), -1, float("nan"), torch.tensor(float("inf"))])
def test_a_count_that_is_none_is_refused_at_its_source(count: Any) -> None:
    """A1, C8: counts that are infinite, negative or not a number."""
    with pytest.raises(UserMistakeError, match="LossSum.count must be a finite number >= 0"):
        checked_loss(LossSum(torch.tensor(1.0), count))
    assert checked_loss(LossSum(torch.tensor(1.0), 0))[1] == 0.0  # a masked micro-batch


@pytest.mark.parametrize("total", [1.0, torch.ones(2), None])
def test_a_total_that_is_not_one_number_is_refused(total: Any) -> None:
    with pytest.raises(UserMistakeError, match="tensor of one number"):
        checked_loss(LossSum(total, 1))


@pytest.mark.parametrize("count", [0.0, -2.0, float("nan")])
def test_a_step_over_nothing_is_refused(count: float) -> None:
    """C8: the counts of a whole step add up to nothing."""
    with pytest.raises(UserMistakeError, match="of step 3 add up to"):
        FiniteWatch(stops=False).check(sums(3, count=count))


@pytest.mark.parametrize(
    ("bad", "reason"), [({"loss": float("nan")}, "loss"), ({"square": float("inf")}, "gradient")]
)
def test_skip_ends_after_ten_in_a_row_and_stop_at_the_first(
    bad: dict[str, float], reason: str
) -> None:
    """C8: train.on_nonfinite."""
    with pytest.raises(UserMistakeError, match=f"{reason}.* in step 1"):
        FiniteWatch(stops=True).check(sums(1, **bad))
    watch = FiniteWatch(stops=False)
    for step in range(1, MOST_IN_A_ROW):
        watch.check(sums(step, **bad))
        watch.committed(sums(step, **bad))
    watch.committed(sums(10))  # a good one between
    for step in range(11, 10 + MOST_IN_A_ROW):
        watch.committed(sums(step, **bad))
    with pytest.raises(UserMistakeError, match=f"{reason}.*10 steps in a row \\(11 to 20\\)"):
        watch.committed(sums(20, **bad))


def test_stop_refuses_the_micro_batch_whose_loss_is_none() -> None:
    nan = torch.tensor(float("nan"))
    check_total(nan, stops=False)
    check_total(torch.tensor(1.0), stops=True)
    with pytest.raises(UserMistakeError, match="the loss is nan"):
        check_total(nan, stops=True)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), -0.1, None, "0.5", 1j, [1.0]])
def test_a_schedule_gives_finite_numbers_from_zero_on(answer: Any) -> None:
    """C8: a schedule that returns NaN, a negative number, or none at all."""
    with pytest.raises(UserMistakeError, match=r"schedule\(4\) must be a finite number >= 0"):
        Rates(lambda step: answer).of(4)


def test_the_schedule_is_asked_once_a_step() -> None:
    asked = []
    rates = Rates(lambda step: asked.append(step) or step / 2)
    assert [rates.of(2), rates.of(2), rates.of(3)] == [1.0, 1.0, 1.5]
    assert rates.of(3) == np.float64(1.5)
    assert asked == [2, 3]
    assert Rates(lambda step: torch.tensor(0.5)).of(1) == 0.5

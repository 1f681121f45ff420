"""Handles steps with NaN or infinite loss or gradients: skips updates, ends hopeless runs."""

from __future__ import annotations

import math

from torch import Tensor

from lazarus.control.vector import StepSums
from lazarus.errors import UserMistakeError

MOST_IN_A_ROW = 10  # skipped steps after which the run ends


class FiniteWatch:
    """Applies ``train.on_nonfinite`` on one rank; all ranks see the same sums.

    Args:
        stops: End the run at the first non-finite step ("stop"), not after ``MOST_IN_A_ROW``.
    """

    def __init__(self, *, stops: bool) -> None:
        self._stops = stops
        self._in_a_row = 0

    def check(self, sums: StepSums) -> None:
        """Check a step's sums before the commit.

        Raises:
            UserMistakeError: The loss counts add up to 0, or a number is not finite with "stop".
        """
        if not sums.count > 0:
            raise UserMistakeError(
                f"the counts of the losses of step {sums.step} add up to {sums.count:g}; LossSum "
                f"needs what its total is a sum over, and every step at least one of it"
            )
        if sums.skips and self._stops:
            raise UserMistakeError(
                f'{sums.skip_reason} in step {sums.step}, and train.on_nonfinite = "stop"'
            )

    def committed(self, sums: StepSums) -> None:
        """Count skipped steps, after the commit.

        Raises:
            UserMistakeError: ``MOST_IN_A_ROW`` steps in a row have been skipped.
        """
        self._in_a_row = self._in_a_row + 1 if sums.skips else 0
        if self._in_a_row >= MOST_IN_A_ROW:
            first = sums.step - self._in_a_row + 1
            raise UserMistakeError(
                f"{sums.skip_reason} in {self._in_a_row} steps in a row ({first} to {sums.step}); "
                f"the model stands as after step {first - 1}"
            )


def check_total(total: Tensor, *, stops: bool) -> None:
    """Check one micro-batch's loss as soon as the loss function returns.

    Raises:
        UserMistakeError: The loss is not finite, and ``train.on_nonfinite`` is "stop".
    """
    if stops and not math.isfinite(value := float(total.detach())):
        raise UserMistakeError(f'the loss is {value}, and train.on_nonfinite = "stop"')

"""Steps whose numbers are none: an update is left out, and who never recovers is stopped."""

from __future__ import annotations

import math

from torch import Tensor

from lazarus.control.vector import StepSums
from lazarus.errors import UserMistakeError

MOST_IN_A_ROW = 10  # skipped steps, until the run ends


class FiniteWatch:
    """Follows ``train.on_nonfinite`` on one rank; all ranks see the same sums.

    Args:
        stops: End the run at the first such step ("stop") rather than at the tenth in a row.
    """

    def __init__(self, *, stops: bool) -> None:
        self._stops = stops
        self._in_a_row = 0

    @property
    def is_skipping(self) -> bool:
        """Whether the last committed step changed nothing."""
        return self._in_a_row > 0

    def check(self, sums: StepSums) -> None:
        """Before the commit.

        Raises:
            UserMistakeError: The loss was a sum over nothing, or "stop" and a number is none.
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
        """After the commit.

        Raises:
            UserMistakeError: Too many steps in a row have changed nothing.
        """
        self._in_a_row = self._in_a_row + 1 if sums.skips else 0
        if self._in_a_row >= MOST_IN_A_ROW:
            first = sums.step - self._in_a_row + 1
            raise UserMistakeError(
                f"{sums.skip_reason} in {self._in_a_row} steps in a row ({first} to {sums.step}); "
                f"the model stands as after step {first - 1}"
            )


def check_total(total: Tensor, *, stops: bool) -> None:
    """One micro-batch's loss, where it arises.

    Raises:
        UserMistakeError: "stop", and it is not finite.
    """
    if stops and not math.isfinite(value := float(total.detach())):
        raise UserMistakeError(f'the loss is {value}, and train.on_nonfinite = "stop"')

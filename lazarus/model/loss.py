"""A loss as a sum and a count: with uneven shares, the mean of the ranks' means would be wrong."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossSum(NamedTuple):
    """A loss of one micro-batch: ``total``, summed over ``count`` tokens or samples.

    A step's gradient is that of all totals, divided by the sum of all counts.
    """

    total: Tensor
    count: int | Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs

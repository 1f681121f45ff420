"""A loss as a sum and what it is a sum over: a mean of means is wrong with uneven shares."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossSum(NamedTuple):
    """``total`` summed over ``count`` things (tokens, samples); gradients are of the sum."""

    total: Tensor
    count: int | Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs

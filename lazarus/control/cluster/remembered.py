"""Answers that a fleet's controller would otherwise work out again for each of its commands. PURE.

Many decisions of one change ask the same of the same immutable tables: ten thousand nodes, eight
times. What was asked is known by identity, which costs nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

_First = TypeVar("_First")
_Second = TypeVar("_Second")
_Answer = TypeVar("_Answer")

_KEPT = 8


def remembered(
    function: Callable[[_First, _Second], _Answer],
) -> Callable[[_First, _Second], _Answer]:
    """``function`` of two objects that nobody changes, with its last few answers kept.

    The objects are kept as well, so that no other can have their identity.
    """
    last: tuple[tuple[_First, _Second, _Answer], ...] = ()

    @wraps(function)
    def answer(first: _First, second: _Second) -> _Answer:
        nonlocal last
        for a, b, known in last:
            if a is first and b is second:
                return known
        found = function(first, second)
        last = ((first, second, found), *last[: _KEPT - 1])
        return found

    return answer

"""A small cache for functions of two immutable objects. PURE.

During one reconfiguration many decisions ask the same question about the same tables, which may
hold ten thousand nodes. Arguments are compared by identity, because comparing their contents would
cost as much as computing the answer.
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
    """Decorate a function of two arguments so that its last 8 results are cached.

    Both arguments must never be changed after the call. The cache holds references to them, so that
    no other object can get the same identity.
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

"""Keeps functions that exchange rows with other ranks out of compiled graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def runs_eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that ``torch.compile`` must not trace: the graph breaks at each call.

    The compiler is imported by whoever compiles, not here: its import takes seconds.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            reason = "rows are exchanged with other ranks"
            disabled = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return call

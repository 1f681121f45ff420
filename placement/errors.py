"""Errors of the planner: what does not fit, with the numbers and the way out."""

from __future__ import annotations


class InfeasiblePlacementError(ValueError):
    """No plan exists for these numbers; the message says which and what would help."""


class InvalidRequestError(ValueError):
    """The input itself is nonsense: a negative load, a missing slot count, unequal lengths."""

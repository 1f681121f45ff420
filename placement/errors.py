"""Errors of the planner. Messages name the numbers and say what would help."""

from __future__ import annotations


class InfeasiblePlacementError(ValueError):
    """No plan exists for this many experts, nodes and slots; the message says what would help."""


class InvalidRequestError(ValueError):
    """An input is invalid, such as a negative load or layers of unequal length."""

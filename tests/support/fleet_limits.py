"""Limits of a fleet for tests, with patience that a test need not spell out."""

from __future__ import annotations

from typing import Any

from lazarus.control.cluster.replacing import Limits


def limits(*, wanted: int, **given: Any) -> Limits:
    """Limits for ``wanted`` nodes; ``given`` replaces single ones."""
    return Limits(**{"wanted": wanted, "rest_s": 5.0, "settled_s": 30.0, "start_s": 300.0, **given})

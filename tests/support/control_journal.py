"""The controller's state from a whole journal, as after a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.restart import replay


def resumed_state(
    entries: Sequence[Mapping[str, Any]], config: ControlConfig, *, now_s: float
) -> Control:
    """The state of a restarted controller, from all journal entries, before any hello."""
    state = replay.blank_state(config)
    for entry in entries:
        state = replay.replayed(state, entry)
    return replay.awakened(state, now_s=now_s)

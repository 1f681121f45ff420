"""The wait for nodes: while the run gathers, holds, or has lost all its members."""

from __future__ import annotations

from dataclasses import dataclass

from lazarus.control.messages import NodesAwaited


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What the run waits for and since when.

    ``reconfiguration/reconfigure.py`` decides to hold, ``machine.py`` how long to wait, and
    ``membership/members.py`` notes what the driver reports on missing nodes.
    """

    hold_reason: str = ""
    tried: tuple[int, ...] = ()  # nodes with which the last attempt had to hold
    broken: bool = False  # an invariant failed: the run never resumes by itself
    gone_s: float | None = None  # since when all members are lost; None: committed since
    awaited: NodesAwaited | None = None  # the driver's last report on missing nodes
    awaited_told: int = 0  # the highest number on record since none was missing
    idle_s: float | None = None  # since when no missing node is being started; None: some are

"""Every time-out of a run, derived from the one that users set, ``recovery.tolerated_stall_s``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds. Each is a function of the tolerated stall, so that they cannot contradict."""

    heartbeat_interval_s: float  # a control thread says that it is there
    heartbeat_timeout_s: float  # silence after which a node counts as lost
    no_progress_s: float  # peers wait, heartbeats go on, but a training thread does not move
    standstill_s: float  # the same where nobody waits for it: the last node, or all of them
    report_s: float  # answer to a fence
    transfer_idle_s: float  # no byte of a transfer arrived
    group_build_s: float  # all pairs of a new group connected
    collective_s: float  # gloo's own limit: the last resort behind active release
    startup_s: float  # a worker process came up and said hello
    controller_silent_s: float  # its loop gives the driver no pulse: hung, so it is replaced
    keeper_silent_s: float  # a node's keeper answers nothing: hung, so it is replaced
    controller_restart_s: float  # workers wait this long for a controller that is gone
    owner_gone_s: float  # a driver on another machine gave no sign: its run's folder is free


def derive_timeouts(tolerated_stall_s: float) -> Timeouts:
    """The rule: a hung process is noticed within the stall, everything after it well before twice.

    Args:
        tolerated_stall_s: How long one process may stand still before it counts as lost, >= 0.5.
    """
    stall = tolerated_stall_s
    startup_s = max(300.0, 30 * stall)
    return Timeouts(
        heartbeat_interval_s=min(1.0, stall / 10),
        heartbeat_timeout_s=stall,
        no_progress_s=stall,
        standstill_s=max(600.0, 60 * stall),
        report_s=stall,
        transfer_idle_s=stall,
        group_build_s=2 * stall,
        collective_s=max(120.0, 10 * stall),
        startup_s=startup_s,
        controller_silent_s=max(5.0, 2 * stall),
        keeper_silent_s=max(15.0, 6 * stall),
        controller_restart_s=startup_s,  # a machine that is busy starts it as slowly as a rank
        owner_gone_s=max(10.0, 2 * stall),
    )


def storage_patience_s(tolerated_stall_s: float) -> float:
    """For how long a checkpoint that nothing can replace is tried again while storage refuses."""
    return 6 * tolerated_stall_s

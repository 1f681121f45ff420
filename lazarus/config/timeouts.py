"""Every time-out of a run, derived from the one that users set, ``recovery.tolerated_stall_s``.

This is the only module in which a stall is multiplied, and the only one that decides how long a
process, a node, a machine or storage may be silent before that has consequences. Constants of
seconds elsewhere are of other kinds: intervals of polling and of messages to people, pauses between
two attempts inside a wait that has its bound from here, and the grace that a closing process gives
to its threads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds. Each is a function of the tolerated stall, so that they cannot contradict."""

    # Signs of life
    heartbeat_interval_s: float  # a worker's control thread says that it is there
    heartbeat_timeout_s: float  # silence after which a node counts as lost
    pulse_interval_s: float  # the controller's loop tells the driver that it turns
    nap_s: float  # a controller that wakes up later than this was kept from hearing the others
    no_progress_s: float  # peers wait, heartbeats go on, but a training thread does not move
    standstill_s: float  # the same where nobody waits for it: the last node, or all of them

    # Reconfiguration
    suspicion_grace_s: float  # a failed collective waits for the news of a death, then fences
    news_s: float  # the launcher says what a process that is gone died of
    report_s: float  # answers to orders; a vector that is missing after all have paused
    flush_s: float  # commits wait for their journal entry, and so for publication
    group_wait_s: float  # every rank waits while groups are built: they are built anew
    group_build_s: float  # a connection to the rendezvous store, all attempts together
    collective_s: float  # gloo's own limit: the last resort behind active release

    # Start, and return
    startup_s: float  # a process came up and said hello
    gather_s: float  # the first nodes wait for machines on which nothing starts
    actor_start_s: float  # Ray started a small actor on a busy machine
    restart_debounce_s: float  # after everybody was lost, nodes that come wait for further ones

    # The controller's death, and the driver's
    controller_silent_s: float  # its loop gives the driver no pulse: hung, so it is replaced
    controller_restart_s: float  # workers and the driver wait for a controller that is gone
    fault_recorded_s: float  # a fault on purpose waits until the controller has it on record
    controller_settled_s: float  # a controller that lived for this long was well
    restart_pause_s: float  # the longest pause before a controller is started again
    reconnect_s: float  # after the first worker is back at a new controller, the others follow
    comeback_s: float  # the same where nobody has come back: without them the run is over
    driver_away_s: float  # a controller waits for its driver, to say how the run ended
    owner_gone_s: float  # a driver on another machine gave no sign: its run's folder is free

    # Machines
    machine_rest_s: float  # a machine is left alone after a second trouble; doubles with each
    node_settled_s: float  # a node that lived for this long was well

    # Storage and snapshots
    storage_stuck_s: float  # storage refuses, or one operation does not move
    storage_patience_s: float  # the same for a checkpoint that nothing can replace
    in_flight_s: float  # a checkpoint that is being written may still come in time
    final_s: float  # a rank that owes its last share or digest moves; one that was told to end ends
    whole_pause_s: float  # before a whole checkpoint is asked for again; doubles with each
    keeper_silent_s: float  # a node's keeper answers nothing: hung, so it is replaced
    keeper_answer_s: float  # a keeper gives memory for a snapshot
    keeper_fetch_s: float  # a keeper sends one record
    keeper_list_s: float  # a keeper says what it holds, or takes note of a generation


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
        pulse_interval_s=min(1.0, stall / 10),
        nap_s=stall / 5,
        no_progress_s=stall,
        standstill_s=max(600.0, 60 * stall),
        suspicion_grace_s=min(0.1, stall / 20),
        news_s=stall,
        report_s=stall,
        flush_s=min(0.1, stall / 20),
        group_wait_s=3 * stall,
        group_build_s=2 * stall,
        collective_s=30 * stall,
        startup_s=startup_s,
        gather_s=max(30.0, 3 * stall),
        actor_start_s=max(60.0, 3 * stall),
        restart_debounce_s=stall,
        controller_silent_s=max(5.0, 2 * stall),
        controller_restart_s=startup_s,  # a machine that is busy starts it as slowly as a rank
        fault_recorded_s=6 * stall,
        controller_settled_s=3 * stall,
        restart_pause_s=stall,
        reconnect_s=stall,
        comeback_s=6 * stall,
        driver_away_s=stall,
        owner_gone_s=max(10.0, 2 * stall),
        machine_rest_s=stall / 2,
        node_settled_s=3 * stall,
        storage_stuck_s=stall,
        storage_patience_s=6 * stall,
        in_flight_s=stall,
        final_s=6 * stall,
        whole_pause_s=stall,
        keeper_silent_s=max(15.0, 6 * stall),
        keeper_answer_s=max(5.0, stall / 2),
        keeper_fetch_s=max(30.0, 3 * stall),
        keeper_list_s=max(1.0, stall / 10),
    )

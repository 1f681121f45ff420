"""All time-outs of a run, derived from one setting, ``recovery.tolerated_stall_s``.

Only this module decides how long a process, a node, a machine or storage may be silent before
anything happens. Constants of seconds in other modules are polling intervals, intervals of messages
to people, pauses between attempts within a wait that is bounded here, the time that a closing
process gives its threads, and how long Ray may take to start an actor or to accept a connection
before another machine is tried; the start as a whole is bounded here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """All time-outs in seconds. Each is a function of the tolerated stall, to be consistent."""

    # Signs of life
    heartbeat_interval_s: float  # between two heartbeats of a worker's control thread
    heartbeat_timeout_s: float  # silence after which a node counts as lost
    pulse_interval_s: float  # between two pulses of the controller's loop to the driver
    nap_s: float  # a controller's loop delayed by more than this may have missed heartbeats
    no_progress_s: float  # peers wait and heartbeats arrive, but a training thread does not move
    standstill_s: float  # the same if no peer waits: the last node, or all nodes

    # Reconfiguration
    suspicion_grace_s: float  # after a failed collective, wait for news of a loss, then fence
    news_s: float  # wait for the launcher to say why a process died
    report_s: float  # wait for answers to orders, and for a missing vector after all paused
    flush_s: float  # commits wait at most so long for their journal entry and publication
    group_wait_s: float  # if all ranks wait longer for groups to be built, building starts again
    group_build_s: float  # connecting to the rendezvous store, all attempts together
    collective_s: float  # gloo's own time-out, used only if waiting ranks are not released before

    # Start, and return
    startup_s: float  # a process must start and say hello
    gather_s: float  # at the start, wait for machines on which no node starts
    actor_start_s: float  # Ray must start a small actor on a busy machine
    restart_debounce_s: float  # after all nodes were lost, new nodes wait for further nodes

    # Death of the controller or of the driver
    controller_silent_s: float  # a controller without a pulse for so long is hung and replaced
    controller_restart_s: float  # workers and the driver wait for a new controller
    fault_recorded_s: float  # an injected fault waits until the controller has recorded it
    controller_settled_s: float  # a controller alive for so long counts as healthy
    restart_pause_s: float  # the longest pause before a controller is started again
    reconnect_s: float  # after the first worker reconnected to a new controller, wait for others
    comeback_s: float  # wait for a first worker to reconnect; without any, the run is over
    driver_away_s: float  # a controller waits for its driver, to report the run's end
    owner_gone_s: float  # a driver on another machine without a sign of life: its folder is free

    # Machines
    machine_rest_s: float  # pause of a machine after its second problem; doubles with each further
    node_settled_s: float  # a node alive for so long counts as healthy

    # Storage and snapshots
    storage_stuck_s: float  # storage refuses, or an operation makes no progress
    storage_patience_s: float  # the same for a checkpoint that nothing can replace
    in_flight_s: float  # wait for a checkpoint that is being written
    final_s: float  # a rank must make progress with its last share or digest, or end when told
    whole_pause_s: float  # before a full checkpoint is requested again; doubles each time
    keeper_silent_s: float  # a node's keeper without an answer for so long is hung and replaced
    keeper_answer_s: float  # a keeper must grant memory for a snapshot
    keeper_fetch_s: float  # a keeper must send one record
    keeper_list_s: float  # a keeper must list its records, or acknowledge a generation


def derive_timeouts(tolerated_stall_s: float) -> Timeouts:
    """Derive all time-outs from the tolerated stall.

    Args:
        tolerated_stall_s: Seconds for which a process may hang before it counts as lost, >= 0.5.
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
        controller_restart_s=startup_s,  # on a busy machine, it starts as slowly as a rank
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

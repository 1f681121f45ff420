"""Events of every kind, put to any state of the controller.

Simulated runs seldom or never have errors of user code, evaluations, faults on purpose or notices
of machines. Since ``decide`` is a function, such an event can be put to a state on the way without
changing the course of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from lazarus.control import messages as m
from lazarus.control.cluster.state import Control
from lazarus.control.ports import (
    DriverGone,
    DriverSaid,
    Event,
    Garbled,
    ManifestDone,
    StreamClosed,
    Tick,
    WorkerSaid,
)
from lazarus.failure import Cause

LATER_S = 1000.0  # longer than anything waits


def event_names() -> set[str]:
    """The name of every event there is: what is said, by its message, and what happens."""
    said = {WorkerSaid, DriverSaid}
    bodies = [get_args(get_type_hints(kind)["body"]) for kind in (m.FromWorker, m.FromDriver)]
    return {kind.__name__ for kind in ({*bodies[0], *bodies[1], *get_args(Event)} - said)}


def probes(state: Control, *, at_s: float) -> Iterator[Event]:
    """At least one event of every kind, well-formed in this state."""
    worker = next(iter([w for w in state.standing.seats if w in state.roster.workers]), "")
    worker = worker or next(iter(state.roster.workers), "")
    for body in (*_answers(state), *_of_workers(state)):
        yield WorkerSaid(worker=worker, body=body, at_s=at_s)
    newcomer = m.Hello(worker="late.0", node_key="late", version=state.config.version)
    yield WorkerSaid(worker="late.0", body=newcomer, at_s=at_s)
    for body in _of_the_driver(state, worker):
        yield DriverSaid(body=body, at_s=at_s)
    step, generation = max(state.step, 1), max(state.resumed, 1)
    for given in ({}, {"error": "disk full"}, {"final": True}, {"final": True, "error": "full"}):
        done: dict[str, Any] = {"generation": generation, "step": step, "at_s": at_s, **given}
        yield ManifestDone(**done)
    yield Garbled(worker=worker, reason="no message", at_s=at_s)
    yield StreamClosed(worker=worker, at_s=at_s)
    yield Tick(at_s=at_s)
    yield Tick(at_s=at_s + LATER_S)
    yield DriverGone(at_s=at_s)


def _answers(state: Control) -> Iterator[m.Body]:
    """What a worker answers to an order, but of an attempt that is over; and its heartbeat."""
    old, step = max(state.generation - 1, 0), state.step
    yield m.Heartbeat(generation=state.resumed, step=step)
    yield m.Vector(generation=old, step=step, lanes=b"", wall_s=0.0)
    yield m.Suspicion(generation=old, step=step)
    yield m.Report(generation=old, committed=step, prepared=step)
    yield m.Aligned(generation=old, step=step)
    yield m.Ready(generation=old, plan_digest="")
    yield m.Paused(generation=old, step=step)
    yield m.DigestPart(generation=old, step=step)
    yield m.Finalized(generation=old, step=step)


def _of_workers(state: Control) -> Iterator[m.Body]:
    """What a worker says of its own accord."""
    now: dict[str, Any] = {"generation": state.resumed, "step": state.step}
    due: dict[str, Any] = {"generation": state.resumed, "step": state.step + 1}
    yield m.LeaveRequest(generation=state.resumed, cause="spot", notice_s=30.0)
    for kind in ("kill", "slow", "join", "controller"):
        yield m.FaultFired(**due, kind=kind, spec=f"{kind}:0@{state.step + 1}", number=1)
    for cause in (Cause.USER_CODE, Cause.INTERNAL):
        yield m.UserError(**due, error="ValueError: on purpose", cause=cause, phase="loss")
    yield m.UserError(**due, error="on purpose", on_purpose=True)
    for ok in (True, False):
        yield m.ShareReported(**now, record=json.dumps({"kind": "persist", "ok": ok, "files": []}))
    odd = {"layer": 0, "expert": 0, "what": "weights", "ranks": [0], "nodes": [0], "majority": 2}
    yield m.ReplicaMismatch(**now, what=json.dumps(odd))
    yield m.Repaired(**now, layer=0, expert=0, ranks=(0,))
    yield m.Evaluated(**now, loss_sum=2.0, count=1.0)
    yield m.Healed(**now)
    yield m.Stacks(text="a stack")


def _of_the_driver(state: Control, worker: str) -> Iterator[m.Body]:
    known = state.roster.workers.get(worker)
    key = state.roster.nodes[known.node].key if known is not None else "n0"
    yield m.DriverHello(run=state.config.run_id)
    yield m.WorkerDied(worker=worker, cause="killed")
    yield m.NodeNotice(node_key=key, notice_s=30.0, cause="drain")
    for kind in ("kill", "slow"):
        yield m.Injected(kind=kind, node_key=key, spec=f"chaos:{kind}")
    yield m.NodesAwaited(missing=9, reason="no machine is free")
    yield m.NodesAwaited(missing=9, reason="no machine is left", is_hopeless=True)
    for is_banned in (False, True):
        yield m.MachineJudged(machine="m", reason="nodes die there", is_banned=is_banned)
    yield m.StopRun(reason="user")
    yield m.StopRun(reason="user", now=True)

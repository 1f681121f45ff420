"""Faults that are injected on purpose: they are recorded, and nobody is blamed for them. PURE."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.roster import node_of
from lazarus.control.cluster.state import Control, Decision
from lazarus.control.commit.unfired import names_a_node
from lazarus.control.messages import (
    FaultFired,
    Go,
    Injected,
    InjectFault,
    KillController,
    NodeEndsMachine,
    StartNode,
)
from lazarus.control.ports import (
    Command,
    Journal,
    Publish,
    Tell,
    TellDriver,
)

_ENDS_NODES = frozenset({"kill", "stop", "stall", "cut", "crash"})  # faults, unless limited by for=


def on_fired(state: Control, worker: str, body: FaultFired, *, at_s: float) -> Decision:
    go = Tell(worker=worker, body=Go(spec=body.spec))
    ends: tuple[Command, ...] = ()
    if body.kind in _ENDS_NODES and ",for=" not in body.spec:
        key = state.roster.nodes[state.roster.workers[worker].node].key
        ends = (TellDriver(body=NodeEndsMachine(node_key=key)),)
    if (worker, body.number) in state.injected.struck:  # an earlier controller process handled it
        return state, (*ends, go)
    if body.spec in state.injected.fired_specs and not names_a_node(body.spec):
        return state, (Tell(worker=worker, body=Go(spec=body.spec, is_done=True)),)
    struck = {"worker": worker, "number": body.number, "spec": body.spec}
    entry = {"kind": "fault", "term": state.term, **struck}
    state = replace(
        state,
        injected=replace(
            state.injected,
            struck=state.injected.struck | {(worker, body.number)},
            fired_specs=state.injected.fired_specs | {body.spec},
        ),
    )
    serial = state.roster.workers[worker].node
    fields = {
        "generation": state.generation,
        "node": serial,
        "kind": body.kind,
        "step": body.step,
        "phase": body.phase,
        "spec": body.spec,
    }
    commands: list[Command] = [
        Journal(entry=entry),
        Publish(t=at_s, event="fault_injected", fields=fields),
        go,
    ]
    if body.kind == "join":
        order = StartNode(reason=body.spec, is_extra=True)
        commands += [TellDriver(body=order)] * max(1, body.count)
    elif body.kind == "controller":
        commands.append(TellDriver(body=KillController()))
    elif body.kind in ("kill", "stop", "stall", "cut"):
        fired = {**state.injected.fired, serial: at_s}
        state = replace(state, injected=replace(state.injected, fired=fired))
    return state, (*ends, *commands)


def on_injected(state: Control, body: Injected, *, at_s: float) -> Decision:
    """Record a random fault that the driver injects, with its time.

    The time makes it possible to measure how long the detection takes. A fault that only the
    process itself can show is passed on to the node's workers.
    """
    found = node_of(state, body.node_key)
    serial = None if found is None else found[0]
    fields = {
        "generation": state.generation,
        "node": serial,
        "kind": body.kind,
        "step": state.step + 1,
        "phase": "",
        "spec": body.spec,
    }
    event = Publish(t=at_s, event="fault_injected", fields=fields)
    if found is None or serial not in state.standing.members:
        return state, (event,)
    if body.kind not in ("slow", "crash", "leave"):
        fired = {**state.injected.fired, found[0]: at_s}
        state = replace(state, injected=replace(state.injected, fired=fired))
    if body.kind not in ("stop", "stall", "slow", "crash"):
        return state, (event,)
    if body.kind == "crash":
        doomed = state.injected.doomed | {found[0]}
        state = replace(state, injected=replace(state.injected, doomed=doomed))
    order = InjectFault(kind=body.kind)
    return state, (event, *(Tell(worker=w, body=order) for w in found[1].workers if w))

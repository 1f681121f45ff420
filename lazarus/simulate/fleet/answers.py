"""Many alike answers entered into the controller's state at once, all but the last. Pure.

The last one goes through ``decide``, which acts on it. The end state is the same as with one
``decide`` for each, at a fraction of the cost; ``VirtualRun(exact=True)`` is the slow twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.messages import Body, Hello, Paused
from lazarus.simulate.fleet import bodies
from lazarus.simulate.rows import FleetPolicy, Setting

FOREVER_S = 1e15


def with_early(state: Control, name: str, early: Mapping[str, Body]) -> Control:
    """The state after answers that none of which is the last.

    Args:
        name: ``reports``, ``aligned`` or ``ready`` of the transition, or ``paused``.
        early: The answers by worker.
    """
    if name == "paused":
        steps = {worker: body.step for worker, body in early.items() if isinstance(body, Paused)}
        return replace(state, paused={**state.paused, **steps})
    assert state.transition is not None
    before = getattr(state.transition, name)
    known = {**before, **early} if before else early
    changed: Any = {name: known}
    return replace(state, transition=replace(state.transition, **changed))


def with_nodes(state: Control, hellos: Sequence[Hello]) -> Control:
    """The state after these nodes said hello, given that the first of them has, as node 0."""
    node, worker = state.nodes[0], state.workers[hellos[0].worker]
    many = list(enumerate(hellos))
    return replace(
        state,
        nodes={i: replace(node, key=b.node_key, workers=(b.worker,)) for i, b in many},
        workers={b.worker: replace(worker, node=i, host=b.host) for i, b in many},
        next_serial=len(many),
    )


def with_time(state: Control, *, now_s: float) -> Control:
    """Every live worker's heartbeats have been heard until now."""
    workers = {
        name: replace(known, heard_s=now_s, progress_s=now_s)
        for name, known in state.workers.items()
    }
    return replace(state, workers=workers)


def control_config(
    setting: Setting, policy: FleetPolicy, *, nodes: int, start_step: int
) -> ControlConfig:
    """What the controller of a simulated run is configured with."""
    slots = policy.slots_per_node or setting.slots_per_node
    return ControlConfig(
        steps=1 << 60,
        nodes=nodes,
        min_nodes=max(1, -(-setting.shape.experts // slots)),
        min_replicas=policy.min_replicas or setting.min_replicas,
        slots_per_node=slots,
        timeouts=derive_timeouts(10.0),
        join_debounce_s=setting.join_debounce_s,
        quorum_timeout_s=FOREVER_S,
        final_checkpoint=False,
        version=bodies.VERSION,
        placement=policy.placement,
        recovery=policy.recovery,
        plan_text=lambda plan: (
            plan.digest
        ),  # nobody here reads it; the text of a large plan is long
        start_step=start_step,
        resume="storage" if start_step else None,
    )

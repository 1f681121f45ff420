"""Enter many similar answers of workers into the controller's state at once. Pure functions.

All answers but the last are entered directly; the last one goes through ``decide``, which acts on
it. The resulting state equals that of one ``decide`` per answer, at a fraction of the cost.
``VirtualRun(exact=True)`` calls ``decide`` for every answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.messages import Body, Hello, Paused
from lazarus.control.ports import Stored
from lazarus.simulate.fleet import bodies
from lazarus.simulate.rows import FleetPolicy, Setting
from placement.request import Floats

FOREVER_S = 1e15


def with_early(state: Control, name: str, early: Mapping[str, Body]) -> Control:
    """Return the state after some answers, not including the last one that is awaited.

    Args:
        state: The controller's state.
        name: Kind of answer: ``reports``, ``aligned`` or ``ready`` (fields of the transition), or
            ``paused``.
        early: The answers by worker.
    """
    if name == "paused":
        steps = {worker: body.step for worker, body in early.items() if isinstance(body, Paused)}
        return replace(
            state, pausing=replace(state.pausing, paused={**state.pausing.paused, **steps})
        )
    assert state.transition is not None
    before = getattr(state.transition, name)
    known = {**before, **early} if before else early
    changed: Any = {name: known}
    return replace(state, transition=replace(state.transition, **changed))


def with_nodes(state: Control, hellos: Sequence[Hello]) -> Control:
    """Return the state after these nodes said hello; the first has done so already, as node 0."""
    node, worker = state.roster.nodes[0], state.roster.workers[hellos[0].worker]
    many = list(enumerate(hellos))
    return replace(
        state,
        roster=replace(
            state.roster,
            nodes={i: replace(node, key=b.node_key, workers=(b.worker,)) for i, b in many},
            workers={b.worker: replace(worker, node=i, host=b.host) for i, b in many},
            next_serial=len(many),
        ),
    )


def with_time(state: Control, *, now_s: float) -> Control:
    """Return the state in which every worker's latest heartbeat is from ``now_s``."""
    workers = {
        name: replace(known, heard_s=now_s, progress_s=now_s)
        for name, known in state.roster.workers.items()
    }
    return replace(state, roster=replace(state.roster, workers=workers))


def with_storage(
    state: Control, *, stored: tuple[Stored, ...], checkpoints: tuple[StoredCheckpoint, ...]
) -> Control:
    """Return the state that knows these experts and checkpoints on storage."""
    known = replace(state.storage, stored=stored, checkpoints=checkpoints)
    return replace(state, storage=known)


def with_commits(state: Control, *, step: int, history: Floats) -> Control:
    """Return the state after commits up to ``step``, with the load history after them."""
    return replace(
        state,
        step=step,
        standing=replace(state.standing, base_plan=state.standing.plan),
        committed=replace(state.committed, history=history),
    )


def control_config(
    setting: Setting, policy: FleetPolicy, *, nodes: int, start_step: int
) -> ControlConfig:
    """Return the controller's configuration for a simulated run."""
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
        plan_text=lambda plan: plan.digest,  # not read in a simulation; the full text is long
        start_step=start_step,
        resume="storage" if start_step else None,
    )

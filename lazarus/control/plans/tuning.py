"""Adaptation to measured steps: sample shares of slow nodes, and rebalancing (rule 34).

Both depend on measurements, so they change only at a pause and are journaled with RESUME.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from statistics import median

from lazarus.control.cluster.state import Control, Decision
from lazarus.control.plans.planning import request_for
from lazarus.control.ports import Command, Publish
from lazarus.control.vector import StepSums
from lazarus.data.sampler import share
from placement.migration.migrate import transfers
from placement.rebalance import MoveCost, considered

SLOW_FACTOR = 2.0  # a node this much slower than the median is slow
STREAK = 8  # consecutive committed steps after which a share changes
MIN_WEIGHT = 0.25  # smallest share weight; 1 is a fair share
REBALANCE_EVERY = 10  # steps between two considerations of a rebalance
REBALANCE_AFTER = 100  # steps after a RESUME without a rebalance
MOVE_COST_S = 0.15  # cost of a planned pause, measured on small machines


def learned(state: Control, sums: Sequence[StepSums], *, at_s: float) -> Decision:
    """Add the measurements of committed steps; set ``wants`` if a change is worth a pause."""
    events: tuple[Command, ...] = ()
    for one in sums:
        state = _measured(state, one)
    # Weights have no effect on a stream, whose samples follow its shards.
    if state.standing.num_samples >= 0 and not state.pausing.wants:
        state, events = _speeds(state, at_s=at_s)
    if not state.pausing.wants and sums:
        state = _rebalance(state, step=sums[-1].step)
    return state, events


def _measured(state: Control, sums: StepSums) -> Control:
    """Update each node's smoothed seconds of own compute per sample."""
    nodes = state.standing.seat_nodes
    speeds = state.tuning.speeds
    weights = [speeds.get(node, 1.0) for node in nodes] if speeds else [1.0]
    sizes = share(state.config.global_batch, len(nodes), weights if min(weights) < 1.0 else None)
    slowest: dict[int, float] = {}
    for node, size, own_s in zip(nodes, sizes, sums.times, strict=True):
        # A rank without samples measures nothing.
        measured = own_s / size if size else inf
        if measured > slowest.get(node, -1.0):
            slowest[node] = measured
    members, last = set(state.standing.members), state.tuning.pace
    pace = {node: s for node, s in last.items() if node in members}
    for node, now_s in slowest.items():
        if now_s < inf and node in members:
            pace[node] = 0.7 * last.get(node, now_s) + 0.3 * now_s
    return replace(state, tuning=replace(state.tuning, pace=pace))


def wanted_weight(own_s: float, usual_s: float) -> float:
    """Share weight of a node, a multiple of 1/8; 1 unless the node is slow.

    Args:
        own_s: Seconds per sample of the node.
        usual_s: Seconds per sample of the median node.
    """
    if usual_s <= 0 or own_s < SLOW_FACTOR * usual_s:
        return 1.0
    return max(MIN_WEIGHT, round(8.0 * usual_s / own_s) / 8.0)


def _speeds(state: Control, *, at_s: float) -> Decision:
    if len(state.tuning.pace) < 3:  # of two nodes it is not clear which one is unusual
        return state, ()
    usual = median(state.tuning.pace.values())
    streaks: dict[int, int] = {}
    changed: dict[int, float] = {}
    for node, own in state.tuning.pace.items():
        weight, now = wanted_weight(own, usual), state.tuning.speeds.get(node, 1.0)
        differs = max(weight, now) >= 1.5 * min(weight, now)
        streaks[node] = state.tuning.streaks.get(node, 0) + 1 if differs else 0
        if streaks[node] >= STREAK:
            changed[node] = weight
    state = replace(state, tuning=replace(state.tuning, streaks=streaks))
    if not changed:
        return state, ()
    events = tuple(
        _slow_event(state, node, weight, usual, at_s=at_s) for node, weight in changed.items()
    )
    speeds = {**_kept(state.tuning.speeds, state.standing.members), **changed}
    return replace(
        state,
        pausing=replace(state.pausing, wants="speed"),
        tuning=replace(state.tuning, next_speeds=speeds, streaks={}),
    ), events


def _kept(speeds: Mapping[int, float], nodes: Sequence[int]) -> dict[int, float]:
    return {node: weight for node, weight in speeds.items() if node in nodes and weight < 1.0}


def _slow_event(state: Control, node: int, weight: float, usual: float, *, at_s: float) -> Publish:
    fields = {
        "generation": state.resumed,
        "node": node,
        "rank": state.standing.seat_nodes.index(node),  # the first rank of the node
        "slowdown": round(state.tuning.pace[node] / usual, 3),
        "weight": weight,
    }
    return Publish(t=at_s, event="rank_slow", fields=fields)


def _rebalance(state: Control, *, step: int) -> Control:
    plan = state.standing.plan
    since = state.standing.lineage[-1][1] if state.standing.lineage else 0
    if (
        plan is None
        or step - since < REBALANCE_AFTER
        or step - state.tuning.looked < REBALANCE_EVERY
    ):
        return state
    steps = step - state.tuning.looked
    state = replace(state, tuning=replace(state.tuning, looked=step))
    fixed = MOVE_COST_S / max(state.committed.step_s, 1e-3)
    regret, better = considered(
        state.tuning.regret,
        request_for(
            state, load=state.committed.history[0], nodes=plan.node_ids, slots=plan.slots_per_node
        ),
        previous=plan,
        latest=state.committed.history[2],
        steps=min(steps, REBALANCE_EVERY),
        cost=MoveCost(fixed=fixed),
    )
    # New shares alone are not worth a pause of all ranks; the next RESUME brings them.
    moves = better is not None and transfers(plan, better)
    return replace(
        state,
        tuning=replace(state.tuning, regret=regret),
        pausing=replace(state.pausing, wants="rebalance" if moves else ""),
    )

"""When drifting loads are worth a pause of all ranks."""

from __future__ import annotations

import numpy as np

from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.parts.committed import Committed
from lazarus.control.parts.standing import Standing
from lazarus.control.plans.tuning import REBALANCE_AFTER, REBALANCE_EVERY, _rebalance
from placement import PlacementRequest, plan
from placement.migration.migrate import transfers
from placement.rebalance import MoveCost, Regret, considered


def drifted(before: list[float], after: list[float], *, slots: int) -> tuple[Control, bool]:
    """A 3-node run whose loads changed, and whether the better plan moves replicas."""
    request = PlacementRequest(load=[before], num_nodes=3, slots_per_node=slots, min_replicas=2)
    made = plan(request)
    turned = PlacementRequest(load=[after], num_nodes=3, slots_per_node=slots, min_replicas=2)
    _, better = considered(
        Regret(), turned, previous=made, steps=10_000, cost=MoveCost(), latest=turned.load
    )
    assert better is not None, "the loads must differ enough for another plan"
    load = np.array([[after]])
    state = Control(
        config=ControlConfig(steps=10**6, nodes=3),
        standing=Standing(plan=made, members=(0, 1, 2), lineage=((1, 0),)),
        committed=Committed(step_s=1.0, history=np.concatenate([load, load, load])),
    )
    return state, bool(transfers(made, better))


def wish_within(state: Control, looks: int) -> str:
    for look in range(looks):
        state = _rebalance(state, step=REBALANCE_AFTER + look * REBALANCE_EVERY)
        if state.pausing.wants:
            break
    return state.pausing.wants


def test_a_better_plan_that_moves_nothing_is_no_reason_to_pause() -> None:
    """R11: a ring of three experts has nowhere to move; only the shares would change."""
    state, moves = drifted([1.0, 1.0, 1.0], [1.0, 1.4, 1.0], slots=2)
    assert not moves
    assert wish_within(state, 200) == ""


def test_a_better_plan_that_moves_replicas_is_one_once_it_has_paid_off() -> None:
    before = [0.33, 4.63, 1.3, 2.28, 14.32, 0.47]
    state, moves = drifted(before, [12.74, 0.12, 2.19, 0.07, 0.16, 0.17], slots=5)
    assert moves
    assert wish_within(state, 200) == "rebalance"

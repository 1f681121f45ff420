"""State that all ranks have in common stays so: schedule of saves, joins, module buffers."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from fault_runs import Event, Watched, watch

from lazarus.checkpoint.store import load_manifest
from lazarus.checkpoint.verify import verify
from lazarus.runtime.ledger import StepLedger
from placement import PlacementRequest, Plan, replan

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(240)

MANY = 3000  # steps; every test stops its run when it has seen what it wants


@pytest.mark.slow
def test_periodic_checkpoints_go_on_after_a_join(tmp_path: Path) -> None:
    """D2: the newcomer's keeper refused all that its rank sent, so no checkpoint came any more."""
    joined: list[int] = []

    def watching(run: Watched, event: Event) -> None:
        if event["event"] == "node_joined":
            joined.append(len(run.events))
        if joined and event["event"] == "checkpoint_persisted" and event["generation"] >= 2:
            joined.append(int(event["step"]))
            if len(joined) == 4:
                run.stop()

    run = watch(
        tmp_path,
        "join@3",
        nodes=2,
        steps=MANY,
        settings=["checkpoint.every=5", "checkpoint.keep=50"],
        on_event=watching,
    )
    assert [e["node"] for e in run.of("node_joined")] == [2]
    after = [e for e in run.of("checkpoint_persisted") if e["generation"] >= 2]
    assert len(after) >= 3
    assert not [e for e in run.of("checkpoint_failed") if "is over" in e["reason"]]
    newest = max(int(e["step"]) for e in after)
    found = verify(str(tmp_path / "checkpoints"))
    assert not found.bad and newest in found.usable


class DecidesLate:
    """Node 2 dies with the result of a step in hand; node 1 comes to its decision too late."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_setup(self, ctx: Any, model: Any) -> None:
        decide, wanted = StepLedger.decide, self.step

        def late(ledger: StepLedger, vector: Any) -> bool:
            if vector.step == wanted and ledger.gen == 1:
                if ctx.node == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                if ctx.node == 1:
                    with ledger._fenced:
                        assert ledger._fenced.wait_for(lambda: ledger.fence > 1, 60)
            return decide(ledger, vector)

        StepLedger.decide = late  # type: ignore[method-assign]


def test_a_rank_that_decides_late_saves_what_the_others_save(run: Any) -> None:
    """D3: a late decision at a snapshot step made the ranks' schedules differ for good.

    The leave makes all ranks compare their schedules; a run with two of them would stop there.
    """
    outcome = run(
        "leave:3@20",
        nodes=4,
        steps=40,
        settings=[
            "checkpoint.every=2",
            "checkpoint.k_persist=1",
            "checkpoint.k_snapshot=1",
            "checkpoint.keep=50",
            "placement.slots_per_node=6",
        ],
        hooks=[DecidesLate(6)],
    )
    outcome.assert_exactly_once(40)
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    assert [e["node"] for e in outcome.of("node_left")] == [3]
    assert outcome.resumed_at(2) == 6, "the late rank got the step by the verdict"
    told = [e for e in outcome.of("checkpoint_failed") if e["step"] == 6]
    assert told, "a share that was never begun is told"
    url = str(outcome.folder / "checkpoints")
    late = [e["step"] for e in outcome.of("checkpoint_persisted") if e["step"] > 22]
    saved = {
        (layer, expert)
        for step in late
        for layer, experts in enumerate(load_manifest(url, step).experts)
        for expert, parts in enumerate(experts)
        if all(version.step > 6 for version in parts.values())
    }
    assert saved == {(layer, expert) for layer in range(2) for expert in range(6)}


class Moves:
    """A placement that, after a loss, puts experts where they are not yet, as drifting loads do."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        plan = replan(request, previous=previous, lost=lost)
        if previous is None or not lost:
            return plan
        turns = [_turned(plan, by) for by in range(1, plan.num_nodes)]
        return max(turns, key=lambda turned: _num_moved_away(previous, turned))


def _turned(plan: Plan, by: int) -> Plan:
    """The plan with every node's experts on the node ``by`` places further."""
    return replace(
        plan,
        expert_of_slot=np.roll(plan.expert_of_slot, by, axis=1),
        share_of_slot=np.roll(plan.share_of_slot, by, axis=1),
        home=((plan.home + by) % plan.num_nodes).astype(plan.home.dtype),
    )


def _num_moved_away(before: Plan, after: Plan) -> int:
    """Experts that live only on nodes which did not have them."""
    layers, experts = after.home.shape
    return sum(
        not {before.node_ids[r] for r in before.ranks_of(x, e)}
        & {after.node_ids[r] for r in after.ranks_of(x, e)}
        for x in range(layers)
        for e in range(experts)
    )


@pytest.mark.slow
def test_an_expert_that_only_newcomers_shall_hold_moves_before_training_goes_on(run: Any) -> None:
    """D12: with heal=behind such an expert had no serving replica: ZeroDivisionError everywhere."""
    settings = ["placement.slots_per_node=3", "recovery.on_lost_expert=fail"]
    behind = run(
        "kill:3@4",
        nodes=4,
        steps=9,
        settings=[*settings, "recovery.heal=behind"],
        placement=Moves(),
    )
    behind.assert_exactly_once(9)
    assert [e["node"] for e in behind.of("node_lost")] == [3]
    (moved,) = behind.of("reconfigured")
    assert moved["moves"] > 0, "some experts had to move before"
    assert moved["moves_behind"] > 0, "others did not"
    assert behind.of("healed")
    before = run(
        "kill:3@4",
        nodes=4,
        steps=9,
        settings=[*settings, "recovery.heal=before"],
        placement=Moves(),
    )
    assert before.digest == behind.digest

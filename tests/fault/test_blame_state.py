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
import torch
from fault_runs import Event, Watched, watch
from torch import Tensor, nn
from torch.nn import functional

from lazarus import LossSum, MoELayer
from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.store import load_manifest
from lazarus.checkpoint.files.verify import verify
from lazarus.runtime.fence.ledger import StepLedger
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


@pytest.mark.slow
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


class Turning(nn.Module):
    """Positions that make their table anew where a batch needs it, as rotary embeddings do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", torch.ones(dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        self.inv_freq = 1.0 / (10.0 ** (torch.arange(self.dim) / self.dim + x.shape[0]))
        return x + torch.sin(places[:, None] * self.inv_freq)


class Running(nn.Module):
    """A small model with everything that writes buffers in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.turn = Turning(32)
        self.norm = nn.BatchNorm1d(32)
        self.moe = MoELayer(dim=32, hidden=32, num_experts=6, top_k=2)
        self.head = nn.Linear(32, 256)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema", torch.zeros(32))
        self.register_buffer("own", torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.turn(self.embed(tokens))
        if self.training:
            self.seen += len(tokens)
            self.own += len(tokens)
            self.ema = 0.9 * self.ema + 0.1 * x.detach().mean((0, 1))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.moe(x))


def next_token(model: nn.Module, batch: Any) -> LossSum:
    tokens = batch["tokens"] if isinstance(batch, dict) else batch
    logits = model(tokens[:, :-1])
    targets = tokens[:, 1:].reshape(-1)
    loss = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    return LossSum(loss, targets.numel())


BUFFERS = {
    "steps": 12,
    "model": lambda ctx: Running(),
    "loss": next_token,
    "settings": [
        "recovery.compare_every=1",
        "checkpoint.every=4",
        "checkpoint.full_at_end=true",
        'train.scratch_buffers=["own"]',
        "placement.slots_per_node=4",
    ],
}


@pytest.mark.parametrize("fault", ["kill:2@5", pytest.param("leave:2@5", marks=pytest.mark.slow)])
def test_buffers_that_a_forward_writes_are_equal_on_all_ranks_after_every_step(
    run: Any, fault: str
) -> None:
    """D1: such a model stopped at its first change of members with "dense_digest differs"."""
    outcome = run(fault, nodes=3, **BUFFERS)
    outcome.assert_exactly_once(12)
    assert [e["node"] for e in outcome.of("node_lost", "node_left")] == [2]
    assert not outcome.of("replica_mismatch"), "compared after every step"
    newest = outcome.folder / "checkpoints"
    reader = CheckpointReader(str(newest), load_manifest(str(newest), 12))
    dense = reader.dense()
    assert not {"model.turn.inv_freq", "model.own"} & set(dense)
    assert int(dense["model.seen"]) > 0
    for name in ("model.ema", "model.norm.running_mean", "model.norm.running_var"):
        assert torch.isfinite(dense[name]).all() and dense[name].abs().sum() > 0
    # 11 samples over 3 ranks in rounds of 2, then over 2 ranks: the most rounds of any rank.
    rounds = 2 * outcome.resumed_at(2) + 3 * (12 - outcome.resumed_at(2))
    assert int(dense["model.norm.num_batches_tracked"]) == rounds


@pytest.mark.slow
def test_a_joiner_gets_buffers_with_the_rest_of_the_state(tmp_path: Path) -> None:
    """D1, joins."""
    after: list[int] = []

    def watching(run: Watched, event: Event) -> None:
        if event["event"] == "node_joined" or (after and event["event"] == "step_committed"):
            after.append(1)
        if len(after) == 6:
            run.stop()

    options = {**BUFFERS, "steps": MANY}
    run = watch(tmp_path, "join@3", nodes=2, on_event=watching, **options)  # type: ignore[arg-type]
    assert [e["node"] for e in run.of("node_joined")] == [2]
    assert not run.of("replica_mismatch") and not run.of("quorum_lost")

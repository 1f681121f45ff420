"""Experts of a user's own kind survive a lost node as those of MoELayer do, compiled or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dispatcher import TensorLayout
from lazarus import ExpertBank, LossSum, MoELayer, RoutedExperts

LAYOUT = TensorLayout({"into": (32, 24), "into_bias": (24,), "out": (24, 32), "scale": ()}, dim=32)
STEPS = 8


def squared(rows: Tensor, expert: Mapping[str, Tensor]) -> Tensor:
    hidden = torch.relu(rows @ expert["into"] + expert["into_bias"]).square()
    return (hidden @ expert["out"]) * (1 + expert["scale"])


class Squared(RoutedExperts):
    """Experts of an own kind, and a router that sees a normalised token."""

    def __init__(self) -> None:
        super().__init__(ExpertBank.of(LAYOUT, num_experts=6), top_k=2, run=squared)
        self.norm, self.router = nn.LayerNorm(32), nn.Linear(32, 6)

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        x_TD = x_BSD.reshape(-1, 32)
        gate_TK, expert_TK = self.router(self.norm(x_TD)).softmax(-1).topk(2)
        return super().forward(x_TD, expert_TK, gate_TK).view(x_BSD.shape)


class Reader(nn.Module):
    def __init__(self, *, compiles: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 32), nn.Linear(32, 256)
        self.own = Squared()
        self.moe = MoELayer(dim=32, hidden=32, num_experts=6, top_k=2)
        if compiles:
            self.compile(backend="aot_eager", dynamic=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.embed(tokens))
        x = x + self.own(x)
        y: Tensor = self.head(x + self.moe(torch.sin(x)))
        return y


def next_token(model: nn.Module, batch: Any) -> LossSum:
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1])
    wanted = tokens[:, 1:].reshape(-1)
    return LossSum(cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"), wanted.numel())


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_own_experts_loses_a_node_and_nothing_else(run: Any, compiles: bool) -> None:
    outcome = run(
        "kill:2@4", nodes=3, steps=STEPS, model=lambda ctx: Reader(compiles=compiles),
        loss=next_token,
        # Compiling takes the longer the busier the machine is.
        settings=[
            "recovery.compare_every=1", f"recovery.tolerated_stall_s={60 if compiles else 10}"
        ],
    )  # fmt: skip
    alone = run(
        nodes=1, steps=STEPS, model=lambda ctx: Reader(compiles=False), loss=next_token,
        settings=["placement.slots_per_node=6"],
    )  # fmt: skip
    outcome.assert_exactly_once(STEPS)
    assert len(outcome.of("node_lost")) == 1
    assert not outcome.of("replica_mismatch")
    for step, loss in outcome.losses.items():
        assert loss == pytest.approx(alone.losses[step], rel=1e-5)
    assert outcome.losses[STEPS] < outcome.losses[1]

"""A layer of somebody else can be tried on random placements before a run depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dispatcher import TensorLayout
from dispatcher.layer.path import expert_path
from lazarus import MoELayer
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank
from lazarus.model.routed import RoutedExperts
from lazarus.testing import conformance

LAYOUT = TensorLayout({"w": (8, 8), "scale": (8,)}, dim=8)


def run(rows: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    return torch.tanh(rows @ fields["w"]) * fields["scale"]


def values_of(expert: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(expert)
    return {n: torch.randn(s, generator=random) for n, s in LAYOUT.fields.items()}


class Own(RoutedExperts):
    """An own kind of expert, and a router that chooses by the sign of a projection."""

    def __init__(self, **settings: Any) -> None:
        bank = ExpertBank.of(LAYOUT, num_experts=4, source=values_of)
        super().__init__(bank, top_k=1, run=run, **settings)
        self.router = nn.Linear(8, 4)

    def forward(self, x_TD: Tensor) -> Tensor:  # type: ignore[override]
        gate_TK, expert_TK = self.router(x_TD).softmax(-1).topk(1)
        return super().forward(x_TD, expert_TK, gate_TK)


def moe(**settings: Any) -> Callable[[], nn.Module]:
    base = {"dim": 8, "hidden": 12, "num_experts": 5, "top_k": 2}
    return lambda: MoELayer(**(base | settings))


class Frozen(Own):
    def __init__(self) -> None:
        super().__init__()
        self.experts.requires_grad_(False)


GOOD: dict[str, Callable[[], nn.Module]] = {
    "MoELayer": moe(),
    "gelu, bias": moe(activation="gelu", bias=True, balance="bias", recompute=True),
    "shared experts": moe(num_shared=1, balance="none"),
    "own experts": Own,
    "recomputed": lambda: Own(recompute=True),
    "frozen": Frozen,
    "two layers": lambda: nn.Sequential(Own(), nn.Linear(8, 8), Own()),
}


@pytest.mark.parametrize("name", GOOD)
def test_layers_that_keep_to_the_protocol_pass(name: str) -> None:
    assert conformance(layer=GOOD[name], seed=1, rounds=4) == 4


def test_a_layer_is_called_as_its_user_says() -> None:
    def call(model: nn.Module, x_TD: Tensor) -> Tensor:
        gate_TK, expert_TK = (x_TD @ torch.ones(8, 4).cumsum(1)).softmax(-1).topk(2)
        y_TD: Tensor = model(x_TD, expert_TK, gate_TK)
        return y_TD

    bank = {"num_experts": 4, "layout": LAYOUT}
    conformance(
        layer=lambda: RoutedExperts(ExpertBank.of(**bank), top_k=2, run=run),  # type: ignore[arg-type]
        call=call,
        rounds=3,
    )


class SharesContext(Own):
    shared = LayerContext.solo(4)

    def attach(self, context: LayerContext | None) -> None:
        self.context = self.shared


class CountsGhosts(Own):
    def _mask(self, mask_T: Tensor | None, x_TD: Tensor) -> None:
        return None


class ForgetsAnchors(Own):
    def _finish(self, started: Any, auxiliary: Tensor | None) -> Tensor:
        kept, self.context.anchors = self.context.anchors, None
        out = super()._finish(started, auxiliary)
        self.context.anchors = kept
        return out


class DependsOnNeighbours(Own):
    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD) + 0 * x_TD + self.experts.weight.shape[0]


class Silent(Own):
    def _finish(self, started: Any, auxiliary: Tensor | None) -> Tensor:
        from dispatcher.layer.dispatch import finish_routing

        routed = finish_routing(started.counting, expert_of_slot=tuple(self.experts.expert_of_slot))
        return expert_path(
            started.sent_TD, started.gate_TK, self.experts.weight, routed, self._path_options()
        )


class AddsToOldGradients(Own):
    def _finish(self, started: Any, auxiliary: Tensor | None) -> Tensor:
        kept, self.context.written = self.context.written, None
        out = super()._finish(started, auxiliary)
        self.context.written = kept
        return out


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no layer": (lambda: nn.Linear(8, 8), "has no MoELayer"),
    "context": (SharesContext, "takes a table of another number of experts"),
    "ghosts": (CountsGhosts, "tokens of a rank without samples must not count"),
    "anchors": (ForgetsAnchors, "left 0 anchors in 1 forwards"),
    "placement": (DependsOnNeighbours, "output of rank . differs"),
    "silent": (Silent, "did not tell its context of a forward"),
    "written": (AddsToOldGradients, "gradient of w of expert . of layer '' differs by"),
}


@pytest.mark.parametrize("name", BAD)
def test_layers_that_do_not_are_named(name: str) -> None:
    build, said = BAD[name]
    with pytest.raises(AssertionError, match=said):
        conformance(layer=build, seed=2)


def test_either_a_policy_or_a_layer() -> None:
    with pytest.raises(TypeError, match="either recovery= or layer="):
        conformance()

"""The layer protocol: what a run needs of a layer whose experts it places, moves and heals."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from lazarus.errors import UserMistakeError
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank


@runtime_checkable
class ElasticLayer(Protocol):
    """A module with experts that a run can place on any ranks.

    ``MoELayer`` and ``RoutedExperts`` are such layers. A module of another class is one if it has
    these attributes, and if its forward routes through ``context`` and reports to it; the easiest
    way is to inherit from ``RoutedExperts``. ``lazarus.testing.conformance`` checks a layer.

    Attributes:
        num_experts: Experts of the layer, whether or not this rank holds them.
        top_k: Experts per token.
        experts: The experts that this rank holds. The bank must be a child module of this name, as
            the experts' global names are ``model.PATH.experts.EXPERT.FIELD``.
        context: Connects the layer with the run.
        router_bias: Bias for the choice of experts, [E], which the run updates after each step from
            the committed counts; None if there is none.
        bias_rate: By how much the bias changes after a step.
    """

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def experts(self) -> ExpertBank: ...
    @property
    def context(self) -> LayerContext: ...
    @property
    def router_bias(self) -> Tensor | None: ...
    @property
    def bias_rate(self) -> float: ...

    def attach(self, context: LayerContext | None) -> None:
        """Connect the layer with a run, or disconnect it with None."""


def moe_layers(model: nn.Module) -> dict[str, ElasticLayer]:
    """The model's layers with experts by path, in the order of ``named_modules``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module._modules.get("experts"), ExpertBank)
        and isinstance(module, ElasticLayer)
    }


def checked_layers(model: nn.Module) -> dict[str, ElasticLayer]:
    """The same as ``moe_layers``, for a model that a run is to train.

    Raises:
        UserMistakeError: There is no such layer, the layers differ in their number of experts, two
            of them share experts, or a bank belongs to no layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserMistakeError(
            "the model has no MoELayer; use lazarus.MoELayer where experts are wanted"
        )
    counts = {layer.num_experts for layer in layers.values()}
    if len(counts) > 1:
        raise UserMistakeError(f"MoE layers have {sorted(counts)} experts; all must have the same")
    owner: dict[int, str] = {}
    for path, layer in layers.items():
        for part in (layer.experts, layer.experts.weight):
            first = owner.setdefault(id(part), path)
            if first != path:
                raise UserMistakeError(
                    f"layers {first} and {path} share their experts; give each a bank of its own, "
                    f"or use one layer in both places"
                )
    for path, module in model.named_modules():
        if isinstance(module, ExpertBank) and id(module) not in owner:
            raise UserMistakeError(
                f"the experts at {path} belong to no layer: the module around them needs the "
                f"attributes of lazarus.model.protocol.ElasticLayer, and must call them 'experts'"
            )
    return layers

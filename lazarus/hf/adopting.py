"""``adopt`` replaces the experts of a transformers model by Lazarus' own; ``release`` undoes it.

transformers calls experts through a registry of functions. The function that is registered here
hands the model's own choice of experts to a ``RoutedExperts`` layer, which is a child of the
experts module. Router, gates, shared experts and everything else stay the model's own code.

Shapes: B samples, S positions, T = B * S tokens, D model width, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dispatcher.layer.layout import TensorLayout
from lazarus.hf.experts import ExpertFunction, experts_modules, layout_of, num_experts
from lazarus.hf.layer import AdoptedExperts
from lazarus.hf.routers import RouterLogits, TensorPlace, bias_of, router_of, top_k_of
from lazarus.model.experts import ExpertBank

IMPLEMENTATION = "lazarus"
CHILD = "lazarus"
Model = TypeVar("Model", bound=nn.Module)
Values = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptOptions:
    """What ``adopt`` and ``load`` let the user choose; see ``adopt``."""

    aux_coef: float | None = 0.0
    bias_rate: float = 0.0
    recompute: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stripped:
    """An experts module whose tensors were taken away.

    Attributes:
        layout: Layout of one expert.
        num_experts: Number of experts.
        tensors: The tensors by name, [E, ...].
    """

    layout: TensorLayout
    num_experts: int
    tensors: dict[str, nn.Parameter]


def adopt(
    model: Model, *, aux_coef: float | None = 0.0, bias_rate: float = 0.0, recompute: bool = False
) -> Model:
    """Replace the experts of a transformers model by experts that a run can place and heal.

    The model computes the same as before. Its routers stay its own. Inside the builder of a run's
    model every rank keeps the given tensors, as a lost expert's initial values come from them; use
    ``load`` for models that do not fit into every rank's memory.

    Args:
        model: A model of transformers with experts; changed in place.
        aux_coef: Coefficient of the balancing loss over global loads, as of ``lazarus.MoELayer``,
            for each layer. None: the configuration's ``router_aux_loss_coef``. 0: no such loss.
        bias_rate: By how much a correction bias of the choice (DeepSeek-V3) changes after a step,
            up for experts with little load. 0: the biases stay as they are.
        recompute: Recompute the experts' activations in the backward, to save memory.

    Returns:
        The model.

    Raises:
        ValueError: The model has no experts or experts of a class that is not carried, a layer has
            no router or bias that the options need, or ``output_router_logits`` is set.
    """
    options = AdoptOptions(aux_coef=aux_coef, bias_rate=bias_rate, recompute=recompute)
    for path, stripped in strip(model).items():
        tensors = stripped.tensors
        attach_experts(model, path, stripped, values=_Given(tensors), options=options)
        stripped.tensors.clear()
    finish_adoption(model)
    return model


def release(model: Model, *, implementation: str | None = None) -> Model:
    """Undo ``adopt``: give a transformers model its own experts again, with the present values.

    Args:
        model: An adopted or loaded model outside of a run; changed in place.
        implementation: The experts' implementation of transformers to use. None: its default.

    Returns:
        The model.

    Raises:
        ValueError: The model was not adopted, or this process does not hold every expert.
    """
    found = {path: m for path, m in model.named_modules() if CHILD in m._modules}
    if not found:
        raise ValueError(f"{type(model).__name__} has no adopted experts")
    for path, module in found.items():
        adopted = module._modules[CHILD]
        assert isinstance(adopted, AdoptedExperts)
        if any("." in name for name in adopted.experts.fields):
            raise ValueError(f"{path} has adapters of lora, which its own class has no place for")
        missing = set(range(adopted.num_experts)) - set(adopted.experts.expert_of_slot)
        if missing:
            raise ValueError(
                f"{path}: this process does not hold experts {sorted(missing)[:8]}; export a "
                f"checkpoint of the run instead"
            )
        _give_back(module, adopted)
    for hook in getattr(model, "_lazarus_hooks", ()):
        hook.remove()
    model._lazarus_hooks = ()  # type: ignore[assignment]
    model.__dict__.pop("save_pretrained", None)
    _set_implementation(model, implementation)
    return model


def strip(model: nn.Module) -> dict[str, Stripped]:
    """Take the experts' tensors off all experts modules, by path.

    Raises:
        ValueError: As for ``adopt``.
    """
    _refuse_router_logits(model)
    found: dict[str, Stripped] = {}
    for path, module in experts_modules(model).items():
        layout, count = layout_of(module), num_experts(module)
        tensors = dict(module.named_parameters(recurse=False))
        for name in tensors:
            delattr(module, name)
        for part in (module, model.get_submodule(path.rpartition(".")[0])):
            part._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to draw
        found[path] = Stripped(layout=layout, num_experts=count, tensors=tensors)
    return found


def attach_experts(
    model: nn.Module, path: str, stripped: Stripped, *, values: Values, options: AdoptOptions
) -> None:
    """Put a layer of Lazarus' experts in the place of those that were taken away.

    Args:
        model: The model.
        path: The experts module.
        stripped: What was taken away.
        values: Gives an expert's tensors by name.
        options: The user's choice.
    """
    module: Any = model.get_submodule(path)
    block = model.get_submodule(path.rpartition(".")[0])
    coefficient = options.aux_coef
    if coefficient is None:
        coefficient = _configured_coefficient(module.config)
    layer = AdoptedExperts(
        _bank(stripped, values),
        top_k=top_k_of(module, block),
        run=ExpertFunction(module),
        recompute=options.recompute,
        bias_rate=options.bias_rate,
        bias=_bias(block, path, stripped, rate=options.bias_rate),
        norm=module.post_expert_norm if module.has_post_expert_norm else None,
    )
    if coefficient:
        router, index = router_of(model, block)
        layer.watch(router, RouterLogits(index), coefficient=coefficient)
    if stripped.tensors and not any(p.requires_grad for p in stripped.tensors.values()):
        layer.experts.weight.requires_grad_(False)
    layer.train(module.training)
    module.add_module(CHILD, layer)
    if layer.experts.expert_of_slot and isinstance(values, _Given):
        layer.experts.source = None  # all experts are here; the given tensors may go


def _bank(stripped: Stripped, values: Values) -> ExpertBank:
    """A bank whose tensors are trained where those that were taken away were."""
    whole, tensors = stripped.layout, stripped.tensors
    fixed = {name for name, tensor in tensors.items() if not tensor.requires_grad}
    if not fixed or fixed == set(tensors):  # all are trained, or the layer is frozen as a whole
        return ExpertBank.of(whole, num_experts=stripped.num_experts, source=values)
    trained = {name: shape for name, shape in whole.fields.items() if name not in fixed}
    frozen = {name: shape for name, shape in whole.fields.items() if name in fixed}
    return ExpertBank.of(
        TensorLayout(trained, dim=whole.dim),
        num_experts=stripped.num_experts,
        source=values,
        frozen_layout=TensorLayout(frozen, dim=whole.dim),
    )


def finish_adoption(model: nn.Module) -> None:
    """Let the model call its new experts, and refuse what would be wrong with them."""
    _set_implementation(model, IMPLEMENTATION)
    hook = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model._lazarus_hooks = (hook,)  # type: ignore[assignment]
    model.save_pretrained = _refuse_saving  # type: ignore[assignment]


def _refuse_saving(*args: Any, **settings: Any) -> None:
    raise ValueError(
        "save_pretrained would write adopted experts under names that transformers does not read; "
        "call lazarus.hf.release(model) before; a run writes by Result.save_pretrained or "
        "lazarus checkpoint export --layout hf"
    )


class _Given:
    """Gives experts out of tensors that a model had."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __call__(self, expert: int) -> dict[str, Tensor]:
        return {name: tensor.detach()[expert] for name, tensor in self._tensors.items()}


def _give_back(module: nn.Module, adopted: AdoptedExperts) -> None:
    bank = adopted.experts
    order = [bank.expert_of_slot.index(expert) for expert in range(bank.num_experts)]
    rows = [bank.values(slot) for slot in order]
    for name in bank.fields:
        is_trained = bank.weight.requires_grad and name in bank.layout.fields
        stacked = torch.stack([row[name] for row in rows])
        setattr(module, name, nn.Parameter(stacked, requires_grad=is_trained))
    adopted.unwatch()
    delattr(module, CHILD)


def _bias(block: nn.Module, path: str, stripped: Stripped, *, rate: float) -> TensorPlace | None:
    if not rate:
        return None
    found = bias_of(block, experts=stripped.num_experts)
    if found is None:
        raise ValueError(
            f"bias_rate={rate}, but {type(block).__name__} around {path} has no correction bias; "
            f"leave bias_rate at 0 and balance by aux_coef"
        )
    if found.name in found.owner._parameters:  # it changes though nothing trains it: a buffer
        value = found.tensor.detach()
        delattr(found.owner, found.name)
        found.owner.register_buffer(found.name, value)
    return found


def _configured_coefficient(config: Any) -> float:
    found = getattr(config, "router_aux_loss_coef", None)
    if found is None:
        raise ValueError(
            f"{type(config).__name__} has no router_aux_loss_coef; give aux_coef a number"
        )
    return float(found)


def _set_implementation(model: nn.Module, implementation: str | None) -> None:
    """Choose who computes the experts, in the configuration of every part of the model."""
    outermost: Any = next(m for m in model.modules() if hasattr(m, "set_experts_implementation"))
    if implementation is None:
        implementation = outermost.get_correct_experts_implementation(None)
    outermost.set_experts_implementation(implementation)
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = implementation  # type: ignore[union-attr]


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for experts; a module that was not adopted computes its own."""
    adopted = module._modules.get(CHILD)
    if adopted is None:  # another model that shares the configuration of an adopted one
        eager: Tensor = type(module).forward.__wrapped__(
            module, hidden_states, top_k_index, top_k_weights
        )
        return eager
    out: Tensor = adopted(hidden_states, top_k_index, top_k_weights)
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _before_forward(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_router_logits"):
        raise ValueError(_NO_ROUTER_LOGITS)
    layers = [m for m in model.modules() if isinstance(m, AdoptedExperts) and m.aux_coef]
    if layers and model.training and _is_reentrant(model):
        raise ValueError(
            "the balancing loss (aux_coef) is lost in reentrant gradient checkpointing; call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def _is_reentrant(model: nn.Module) -> bool:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            keywords = getattr(function, "keywords", {})
            if keywords.get("use_reentrant"):
                return True
    return False


def _refuse_router_logits(model: Any) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "output_router_logits", False) is True:
            raise ValueError(_NO_ROUTER_LOGITS)


_NO_ROUTER_LOGITS = (
    "output_router_logits=True adds transformers' own balancing loss, which depends on how a batch "
    "is split over ranks; set output_router_logits=False in the configuration and balance by "
    "aux_coef (None: at the model's router_aux_loss_coef)"
)

"""Builds the user's model for training: on the rank's device, with values, in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lazarus.errors import UserMistakeError
from lazarus.model.experts import ExpertBank, deferred_experts

_MOST_NAMED = 8


def built(build: Callable[[], nn.Module], *, seed: int, device: torch.device) -> nn.Module:
    """Build the model on ``device``, in training mode; its expert banks hold no expert yet.

    The whole model is put into training mode, as a training loop does by calling ``train()``. A
    module that must stay in evaluation mode overrides its ``train`` method.

    Args:
        build: The user's function.
        seed: Seed of the initial values.
        device: Where the state lives.

    Raises:
        UserMistakeError: The function returned something else, or the model was built on the meta
            device and some tensors got no values.
    """
    torch.manual_seed(seed)
    with deferred_experts():
        model: object = build()
    if not isinstance(model, nn.Module):
        raise UserMistakeError(
            f"the model function returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    materialise(model, device=device)
    return model.to(device).train()


@torch.no_grad()
def materialise(model: nn.Module, *, device: torch.device) -> None:
    """Give memory and initial values to tensors that were built on the meta device.

    Values come from ``reset_parameters`` of the modules, children before their parents. A module
    is reset only if all its tensors, and those of its children, were on the meta device. Tied
    parameters stay tied. Expert banks are left out: their rows are made when experts are placed.

    Raises:
        UserMistakeError: Some tensors got no values; names them.
    """
    for module in model.modules():
        if isinstance(module, ExpertBank) and module.weight.is_meta:
            module.allocate(num_slots=0, device=device)
    if not any(tensor.is_meta for _, tensor in _tensors(model)):
        return
    hollow = [module for module in model.modules() if _is_hollow(module)]
    made: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, ExpertBank):
            _allocate(module, made, device=device)
    for module in reversed(hollow):
        reset = getattr(module, "reset_parameters", None)
        reset = getattr(module, "_reset_parameters", None) if reset is None else reset
        if callable(reset):
            reset()
    new = {id(tensor) for tensor in made.values()}
    empty = [name for name, tensor in _tensors(model) if id(tensor) in new and _is_unset(tensor)]
    if empty:
        more = f" and {len(empty) - _MOST_NAMED} more" if len(empty) > _MOST_NAMED else ""
        raise UserMistakeError(
            f"the model was built on the meta device, and nothing gives values to "
            f"{', '.join(empty[:_MOST_NAMED])}{more}; build these on a real device, or give their "
            f"modules a reset_parameters() that fills them"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, without those of expert banks."""
    for path, module in model.named_modules():
        if not isinstance(module, ExpertBank):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{path}.{key}" if path else key, tensor


def _is_hollow(module: nn.Module) -> bool:
    """Whether the module has tensors, and all of them are on the meta device."""
    found = [tensor.is_meta for _, tensor in _tensors(module)]
    return bool(found) and all(found)


def _allocate(module: nn.Module, made: dict[int, Tensor], *, device: torch.device) -> None:
    """Replace the module's meta tensors by tensors that are recognised while nothing fills them."""
    for key, param in module._parameters.items():
        if param is not None and param.is_meta:
            if id(param) not in made:
                fresh = nn.Parameter(_unset(param, device), requires_grad=param.requires_grad)
                made[id(param)] = fresh
            module._parameters[key] = made[id(param)]  # type: ignore[assignment]
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            if id(buffer) not in made:
                made[id(buffer)] = _unset(buffer, device)
            module._buffers[key] = made[id(buffer)]


def _unset(like: Tensor, device: torch.device) -> Tensor:
    fresh = torch.empty_like(like, device=device)
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return fresh.fill_(float("nan"))
    return fresh.fill_(True if like.dtype == torch.bool else torch.iinfo(like.dtype).max)


def _is_unset(tensor: Tensor) -> bool:
    """Whether nothing has filled the tensor. Of a mask of ones this cannot be told: it is unset."""
    if not tensor.numel():
        return False
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(torch.isnan(tensor).any())
    most = True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    return bool((tensor == most).all())

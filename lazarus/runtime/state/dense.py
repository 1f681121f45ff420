"""The dense parameters of a model: trained ones in one flat buffer, frozen ones as they are."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lazarus.checkpoint.files.tensors import DTYPE_NAMES
from lazarus.runtime.state.banks import gradients

Named = list[tuple[str, nn.Parameter]]


class DenseParameters:
    """All parameters of a model but those of its experts, each once, by its first name.

    Trained parameters and their gradients become views of two flat float32 tensors. A frozen
    parameter (``requires_grad`` False when the model is built) keeps its type and its own memory,
    and has no gradient: it is state, but takes no part in sums, norms and optimizer steps.

    Attributes:
        all, trained, frozen: Parameters with their names, in the model's order.
        flat, flat_grad: The trained parameters one after another, and their gradients.

    Raises:
        ValueError: A trained parameter is not float32, or a frozen one cannot be saved.
    """

    def __init__(self, model: nn.Module, *, without: Collection[int], device: torch.device) -> None:
        """``without``: ids of the experts' parameters."""
        self.all: Named = [
            (name, p) for name, p in model.named_parameters() if id(p) not in without
        ]
        self.trained = [(name, p) for name, p in self.all if p.requires_grad]
        self.frozen = [(name, p) for name, p in self.all if not p.requires_grad]
        for name, param in self.frozen:
            _check_frozen(name, param)
            if not param.is_contiguous():
                param.data = param.detach().contiguous()
        total = sum(p.numel() for _, p in self.trained)
        self.flat = torch.zeros(total, dtype=torch.float32, device=device)
        self.flat_grad = gradients(self.flat)
        start = 0
        for name, param in self.trained:
            _check_trained(name, param)
            view = self.flat[start : start + param.numel()].view(param.shape)
            view.copy_(param.detach())
            param.data = view
            param.grad = self.flat_grad[start : start + param.numel()].view(param.shape)
            start += param.numel()

    def changed(self) -> list[str]:
        """Names of parameters that were frozen or unfrozen since the model was built."""
        frozen = {id(p) for _, p in self.frozen}
        return [name for name, p in self.all if p.requires_grad == (id(p) in frozen)]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of shared tensors: ``model.state_dict()``'s name -> the name of the state.

    A tensor's state has the first of its names; buffers that are not persistent have none.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        scratch = module._non_persistent_buffers_set
        buffers = [(key, t) for key, t in module._buffers.items() if key not in scratch]
        for key, tensor in (*module._parameters.items(), *buffers):
            if tensor is None:
                continue
            name = f"{path}.{key}" if path else key
            if first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    return tied


def _check_trained(name: str, param: nn.Parameter) -> None:
    if param.dtype != torch.float32:
        raise ValueError(
            f"parameter {name} is {param.dtype}; master weights are float32: convert it with "
            f'.float() when the model is built (train.precision = "bf16" computes in bfloat16), or '
            f"freeze it with requires_grad_(False)"
        )


def _check_frozen(name: str, param: nn.Parameter) -> None:
    content: Tensor = param.data
    if type(content) is not Tensor:
        raise ValueError(
            f"parameter {name} holds a {type(content).__name__}; parameters are plain tensors"
        )
    if content.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"parameter {name} is {content.dtype}; a frozen parameter is {known}")

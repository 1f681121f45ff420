"""Optimizer and model state as bytes in a fixed order: dense images and expert records.

An expert's record is its parameters and everything the optimizer keeps for them; records travel
when a replica is healed. The dense image is all other state. Both orders depend on the model and
the optimizer alone, so sender and receiver need not negotiate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_NO_SETTINGS = frozenset({"params", "lr"})  # the learning rate is a function of the step


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as uint8 [n]."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def fill_state(optimizer: Optimizer) -> None:
    """Create the optimizer's state before the first step, all zeros.

    Optimizers create their state lazily, but a joining rank needs the tensors to receive into. One
    step with zero gradients and learning rate 0 creates them; then parameters are restored and
    the state is zeroed.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]
        for param in group["params"]:
            kept.append((param, param.detach().clone()))
            param.grad.zero_()
    optimizer.step()
    with torch.no_grad():
        for param, before in kept:
            param.copy_(before)
            for key, value in optimizer.state[param].items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif isinstance(value, int | float):
                    optimizer.state[param][key] = type(value)(0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def state_tensors(optimizer: Optimizer, param: nn.Parameter) -> list[tuple[str, Tensor]]:
    """Tensors that the optimizer keeps for one parameter and that have its shape, sorted by key."""
    state = optimizer.state[param]
    return [
        (key, state[key])
        for key in sorted(state)
        if isinstance(state[key], Tensor) and state[key].shape == param.shape
    ]


def read_scalars(optimizer: Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> str:
    """JSON of every single number that the optimizer keeps; equal on all ranks at one step.

    Raises:
        TypeError: The optimizer keeps a tensor that is neither a number nor shaped like its
            parameter.
    """
    found: dict[str, dict[str, float]] = {}
    for name, param in named:
        for key, value in sorted(optimizer.state[param].items()):
            if isinstance(value, Tensor) and value.shape != param.shape:
                if value.numel() != 1:
                    raise TypeError(
                        f"optimizer state {key} of {name} has shape {tuple(value.shape)}; only "
                        f"tensors shaped like the parameter and single numbers can be moved"
                    )
                found.setdefault(name, {})[key] = float(value.item())
            elif isinstance(value, int | float):
                found.setdefault(name, {})[key] = float(value)
    return json.dumps(found)


def write_scalars(
    optimizer: Optimizer, named: Sequence[tuple[str, nn.Parameter]], text: str
) -> None:
    """Set the numbers that ``read_scalars`` read on another rank."""
    found = json.loads(text)
    for name, param in named:
        for key, number in found.get(name, {}).items():
            value = optimizer.state[param].get(key)
            if isinstance(value, Tensor):
                value.fill_(number)
            else:
                optimizer.state[param][key] = type(value)(number)


def read_settings(optimizer: Optimizer, *, base_lr: Sequence[float]) -> str:
    """JSON of each parameter group's numeric settings, with learning rates before the schedule."""
    groups = [
        {
            key: group[key]
            for key in sorted(group)
            if key not in _NO_SETTINGS and _is_number(group[key])
        }
        for group in optimizer.param_groups
    ]
    return json.dumps({"groups": groups, "base_lr": list(base_lr)})


def write_settings(optimizer: Optimizer, text: str) -> list[float]:
    """Set what ``read_settings`` read on another rank. Returns the learning rates by group."""
    found = json.loads(text)
    for group, settings in zip(optimizer.param_groups, found["groups"], strict=True):
        for key, value in settings.items():
            group[key] = tuple(value) if isinstance(value, list) else value
    return [float(rate) for rate in found["base_lr"]]


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(_is_number(part) for part in value)
    return isinstance(value, int | float)


class DenseImage:
    """The dense tensors of a rank as one virtual byte string."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._parts = [as_bytes(tensor) for tensor in tensors]
        self.num_bytes = sum(part.numel() for part in self._parts)

    def _pieces(self, first: int, last: int) -> Iterator[Tensor]:
        start = 0
        for part in self._parts:
            low, high = max(first, start), min(last, start + part.numel())
            if low < high:
                yield part[low - start : high - start]
            start += part.numel()

    def read(self, first: int, last: int) -> Tensor:
        """Copy bytes [first, last) into a new uint8 tensor."""
        pieces = list(self._pieces(first, last))
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def write(self, first: int, content: Tensor) -> None:
        """Overwrite the bytes from ``first`` on with ``content``, a uint8 tensor."""
        done = 0
        for piece in self._pieces(first, first + content.numel()):
            piece.copy_(content[done : done + piece.numel()])
            done += piece.numel()

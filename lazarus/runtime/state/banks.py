"""Gradient buffers of a rank's expert banks, and the order of the banks' rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from dispatcher.local.blocks import shared_zeros
from lazarus.model.experts import ExpertBank
from lazarus.runtime.state.flat_bytes import state_tensors


def gradients(parameters: Tensor) -> Tensor:
    """A gradient buffer of zeros; on a CPU in memory that ranks of the same machine can read."""
    if parameters.device.type == "cpu":
        return shared_zeros(parameters.shape, parameters.dtype)
    return torch.zeros_like(parameters)


def arrange(bank: ExpertBank, optimizer: Optimizer, order: Sequence[int]) -> None:
    """Reorder the bank's rows and their optimizer state to match ``order``.

    Does nothing if the bank holds other experts than ``order``. Gradients are not moved.

    Args:
        bank: One layer's experts on this rank.
        optimizer: The optimizer that keeps state for the bank's weight.
        order: Expert of each slot, -1 for an empty slot; slots beyond its length stay empty.
    """
    held = list(bank.expert_of_slot)
    wanted = [*order, *[-1] * (len(held) - len(order))]
    if wanted == held or sorted(wanted) != sorted(held):
        return
    empty = iter(slot for slot, expert in enumerate(held) if expert < 0)
    source_S = [held.index(expert) if expert >= 0 else next(empty) for expert in wanted]
    weight = bank.weight
    for tensor in (weight.detach(), *(t for _, t in state_tensors(optimizer, weight))):
        tensor.copy_(tensor[source_S])
    bank.expert_of_slot[:] = wanted

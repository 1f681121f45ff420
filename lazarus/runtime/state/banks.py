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
    kept = [] if bank.frozen is None else [bank.frozen.detach()]
    if not bank.is_frozen:
        kept += [bank.weight.detach(), *(t for _, t in state_tensors(optimizer, bank.weight))]
    for tensor in kept:
        tensor.copy_(tensor[source_S])
    bank.expert_of_slot[:] = wanted


def grow(bank: ExpertBank, optimizer: Optimizer, num_slots: int) -> None:
    """Give the bank ``num_slots`` slots, more than it has; rows and optimizer state stay."""
    weight, held = bank.weight, list(bank.expert_of_slot)
    shaped = [] if bank.is_frozen else state_tensors(optimizer, weight)
    weight.data = _grown(weight.detach(), num_slots)
    if not bank.is_frozen:
        weight.grad = gradients(weight.data)
    for key, rows in shaped:
        optimizer.state[weight][key] = _grown(rows, num_slots)
    if bank.frozen is not None:
        bank.frozen.data = _grown(bank.frozen.detach(), num_slots)
    bank.expert_of_slot[:] = held + [-1] * (num_slots - len(held))


def _grown(rows: Tensor, num_slots: int) -> Tensor:
    grown = rows.new_zeros(num_slots, rows.shape[1])
    grown[: len(rows)] = rows
    return grown

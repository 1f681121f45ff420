"""Rows move with their moments into the order in which gradients need no packing."""

from __future__ import annotations

import pytest
import torch

from dispatcher.local.blocks import standing
from lazarus.model.experts import ExpertBank, deferred_experts
from lazarus.runtime.state.banks import arrange, gradients

HELD = [4, -1, 2, 7, -1]


def bank_and_optimizer() -> tuple[ExpertBank, torch.optim.Optimizer]:
    """Each row, and its first moment, holds its expert's number."""
    with deferred_experts():
        bank = ExpertBank(dim=4, hidden=4, num_experts=8)
    bank.allocate(num_slots=len(HELD), device="cpu")
    optimizer = torch.optim.AdamW([bank.weight])
    optimizer.step()  # makes the state
    for slot, expert in enumerate(HELD):
        bank.assign(slot, expert)
        bank.weight.data[slot] = expert
        optimizer.state[bank.weight]["exp_avg"][slot] = expert
    return bank, optimizer


def test_rows_and_moments_move_together() -> None:
    bank, optimizer = bank_and_optimizer()
    arrange(bank, optimizer, [2, 7, 4])
    assert bank.expert_of_slot == [2, 7, 4, -1, -1]
    for rows in (bank.weight, optimizer.state[bank.weight]["exp_avg"]):
        assert rows[:, 0].tolist()[:3] == [2, 7, 4]
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


@pytest.mark.parametrize("order", [HELD, [4, 2], [4, 2, 7, 1]])
def test_another_set_of_experts_or_the_same_order_moves_nothing(order: list[int]) -> None:
    bank, optimizer = bank_and_optimizer()
    before = bank.weight.detach().clone()
    arrange(bank, optimizer, order)
    assert bank.expert_of_slot == HELD
    assert torch.equal(bank.weight, before)


def test_gradients_lie_where_peers_can_read_them() -> None:
    parameters = torch.ones(3, 5)
    grad = gradients(parameters)
    assert grad.shape == parameters.shape and not grad.any()
    assert standing(grad.view(-1).view(torch.uint8)) is not None

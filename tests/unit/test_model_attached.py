"""The model spread over ranks computes what it computes alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import Exchange, RoutingTable, flat_all_reduce, run_ranks, sum_replica_gradients
from dispatcher.errors import RoutingTableError
from lazarus.model import gpt
from lazarus.model.context import LayerContext
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer, moe_layers, take_auxiliary

EXPERTS = 5
TOKENS = torch.arange(6 * 17).view(6, 17) * 7 % 64
BUILDING = threading.Lock()
FRACTIONS = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])


def spread_slots(ranks: int) -> np.ndarray:
    """Every expert twice where there are two ranks, in no particular order."""
    slots = np.full((ranks, EXPERTS), -1)
    for expert in range(EXPERTS):
        for rank in {expert % ranks, (expert + 2) % ranks}:
            slots[rank, int((slots[rank] >= 0).sum())] = expert
    return slots


def attached(exchange: Exchange, slots: np.ndarray, *, seed: int, top_k: int) -> gpt.GPT:
    with BUILDING:  # it draws from the one global generator
        torch.manual_seed(seed)
        with deferred_experts():
            model = gpt.build(_shape(top_k))
    for layer, moe in enumerate(moe_layers(model).values()):
        table = RoutingTable.from_plan_arrays(slots, rank=exchange.rank)
        held = table.slots_of(exchange.rank)
        moe.experts.allocate(num_slots=len(held), device="cpu")
        for slot, expert in enumerate(held):
            moe.experts.assign(slot, expert)
            if expert >= 0:
                moe.experts.initialise(slot)
        moe.attach(LayerContext(layer=layer, exchange=exchange, table=table, expected_E=FRACTIONS))
    return model


def _shape(top_k: int) -> gpt.GPTConfig:
    return gpt.GPTConfig(
        layers=2, dim=32, heads=2, vocab=64, seq_len=16, experts=EXPERTS, top_k=top_k, moe_every=1
    )


def gradients(model: gpt.GPT, tokens: Tensor) -> Tensor:
    total, _ = gpt.loss(model, {"tokens": tokens})
    aux = take_auxiliary(model)
    assert aux is not None
    (total + aux).backward()
    return (total + aux).detach()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_loss_and_gradients_are_those_of_one_process(ranks: int, top_k: int) -> None:
    torch.manual_seed(3)
    alone = gpt.build(_shape(top_k))
    for moe in moe_layers(alone).values():
        moe.context.expected_E = FRACTIONS
    expected = gradients(alone, TOKENS)
    slots = spread_slots(ranks)

    def body(exchange: Exchange) -> tuple[gpt.GPT, Tensor]:
        model = attached(exchange, slots, seed=3, top_k=top_k)
        loss = gradients(model, TOKENS[exchange.rank :: ranks])
        exchange.all_reduce(loss, label="commit")
        for name, parameter in model.named_parameters():
            if not name.endswith("experts.weight"):
                assert parameter.grad is not None
                flat_all_reduce(parameter.grad, exchange)
        for moe in moe_layers(model).values():
            assert moe.experts.weight.grad is not None
            sum_replica_gradients(moe.experts.weight.grad, moe.context.table, exchange)
        return model, loss

    for model, loss in run_ranks(body, size=ranks):
        assert torch.allclose(loss, expected, rtol=1e-5)
        compare(alone, model)


def compare(alone: gpt.GPT, model: gpt.GPT) -> None:
    whole = dict(moe_layers(alone))
    for name, moe in moe_layers(model).items():
        assert torch.equal(moe.context.counts_E, whole[name].context.counts_E)
        for slot, expert in enumerate(moe.experts.expert_of_slot):
            if expert >= 0:
                assert torch.equal(moe.experts.weight[slot], whole[name].experts.weight[expert])
                close(moe.experts.weight.grad, slot, whole[name].experts.weight.grad, expert)
    reference = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.endswith("experts.weight"):
            assert parameter.grad is not None
            scale = float(reference[name].grad.abs().max())
            assert (parameter.grad - reference[name].grad).abs().max() <= 1e-5 * scale + 1e-9


def close(found: Tensor | None, slot: int, expected: Tensor | None, expert: int) -> None:
    assert found is not None
    assert expected is not None
    scale = float(expected[expert].abs().max())
    assert (found[slot] - expected[expert]).abs().max() <= 1e-5 * scale + 1e-9


def test_a_rank_without_samples_takes_part_and_changes_nothing() -> None:
    torch.manual_seed(4)
    alone = MoELayer(dim=8, hidden=16, num_experts=3, top_k=2)
    rows = alone.experts.weight.detach()
    x = torch.randn(1, 5, 8)
    expected = alone(x)
    expected.pow(2).sum().backward()
    slots = np.array([[0, 1], [1, 2]])
    layers = [MoELayer(dim=8, hidden=16, num_experts=3, top_k=2) for _ in range(2)]
    for layer in layers:
        layer.router.load_state_dict(alone.router.state_dict())

    def body(exchange: Exchange) -> tuple[Tensor, Tensor]:
        layer = layers[exchange.rank]
        table = RoutingTable.from_plan_arrays(slots, rank=exchange.rank)
        layer.experts.allocate(num_slots=2, device="cpu")
        for slot, expert in enumerate(table.slots_of(exchange.rank)):
            layer.experts.assign(slot, expert)
            layer.experts.weight.data[slot] = rows[expert]
        layer.attach(LayerContext(layer=0, exchange=exchange, table=table))
        layer.context.ghost = exchange.rank == 1
        y = layer(x)
        y.pow(2).sum().backward()
        assert layer.experts.weight.grad is not None
        sum_replica_gradients(layer.experts.weight.grad, table, exchange)
        return y.detach(), layer.experts.weight.grad

    (y, grad), (nothing, grad_ghost) = run_ranks(body, size=2)
    assert torch.equal(y, expected.detach())
    assert not nothing.any()
    assert alone.experts.weight.grad is not None
    assert torch.equal(grad[1], grad_ghost[0])
    torch.testing.assert_close(grad_ghost[1], alone.experts.weight.grad[2], rtol=1e-5, atol=1e-6)


def test_a_bank_without_the_tables_experts_cannot_be_attached() -> None:
    layer = MoELayer(dim=8, hidden=16, num_experts=3, top_k=1)
    layer.experts.allocate(num_slots=2, device="cpu")
    table = RoutingTable.solo(3)
    context = LayerContext(layer=0, exchange=run_ranks(lambda e: e, size=1)[0], table=table)
    with pytest.raises(RoutingTableError, match="should hold experts"):
        layer.attach(context)

"""The expert path on whatever device there is; what needs a GPU is skipped, with its reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

from dispatcher import Exchange, RoutingTable, SplitRule, run_ranks
from dispatcher.gradients import slots_for_exchange, sum_replica_gradients
from dispatcher.reference import dense_moe
from lazarus.model.context import LayerContext
from lazarus.model.moe import MoELayer

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA is untried")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
EXPERTS, DIM = 6, 16


def layer_of() -> MoELayer:
    torch.manual_seed(5)
    return MoELayer(
        dim=DIM, hidden=24, num_experts=EXPERTS, top_k=2, balance="none", renormalize=True
    )


def tokens(rank: int) -> Tensor:
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(rank))


def reference(num_ranks: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs by rank, and gradients of router and experts, by plain autograd on the CPU."""
    layer = layer_of()
    rows = layer.experts.weight.detach().clone().requires_grad_()
    router = layer.router.weight.detach().clone().requires_grad_()
    fields = [layer.experts.field_views(row) for row in rows]
    outputs = []
    for rank in range(num_ranks):
        x_TD = tokens(rank).reshape(-1, DIM)
        gate_TK, expert_TK = (x_TD @ router.t()).softmax(-1).topk(2)
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        y_TD = dense_moe(
            x_TD, expert_TK, gate_TK, fields, activation=layer.experts.layout.activation
        )
        outputs.append(y_TD.detach())
        y_TD.square().sum().backward()
    assert rows.grad is not None and router.grad is not None
    return outputs, router.grad, rows.grad


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach().cpu(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["home", "balanced", "shares"])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_on_a_device_compute_what_plain_autograd_does(
    device: str, mode: str, size: int
) -> None:
    outputs, router_grad, expert_grad = reference(size)
    whole = layer_of()

    def body(exchange: Exchange) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        layer = copy.deepcopy(whole).to(device)
        slots = [[e for e in range(EXPERTS) if size == 1 or e % size != r] for r in range(size)]
        table = RoutingTable.from_plan_arrays(slots, rank=exchange.rank)
        held = slots_for_exchange(table)
        layer.experts.allocate(num_slots=len(held), device=device)
        for slot, expert in enumerate(held):
            layer.experts.assign(slot, expert)
            layer.experts.weight.data[slot] = whole.experts.weight.data[expert].to(device)
        layer.experts.weight.grad = torch.zeros_like(layer.experts.weight)
        rule = SplitRule(mode=mode)
        layer.attach(LayerContext(layer=0, exchange=exchange, table=table, rule=rule))
        y = layer(tokens(exchange.rank).to(device))
        y.square().sum().backward()
        assert layer.router.weight.grad is not None
        exchange.all_reduce(layer.router.weight.grad, label="dense_grad")
        sum_replica_gradients(
            layer.experts.weight.grad, table, exchange, served_ER=layer.context.served_ER,
            expert_of_slot=held,
        )  # fmt: skip
        rows = {e: layer.experts.weight.grad[s] for s, e in enumerate(held)}
        return y.reshape(-1, DIM), layer.router.weight.grad, rows

    for rank, (y_TD, router, rows) in enumerate(run_ranks(body, size=size)):
        close(y_TD, outputs[rank])
        close(router, router_grad)
        for expert, row in rows.items():
            close(row, expert_grad[expert])


@GPU
def test_a_layer_waits_for_the_device_once() -> None:
    layer = layer_of().to("cuda")
    x = tokens(0).to("cuda")
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1, [str(wait.message) for wait in waits]

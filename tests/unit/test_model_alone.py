"""MoE layers and the dispatcher in a user's own program: copies, compilers, views, meta tensors."""

from __future__ import annotations

import copy
import gc
import logging
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dispatcher import Dispatcher, Exchange, RoutingTable, SoloExchange, run_ranks
from dispatcher.processes import run_processes
from lazarus.model.context import LayerContext
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer, take_auxiliary


def layer_of(**settings: object) -> MoELayer:
    torch.manual_seed(5)
    base: dict[str, object] = {"dim": 16, "hidden": 24, "num_experts": 6, "top_k": 2}
    return MoELayer(**(base | settings))  # type: ignore[arg-type]


def tokens(seed: int = 6) -> Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(8, 3), (8, 5), (8, 8), (64, 8), (128, 8), (9, 7)]
)
def test_any_number_of_choices_of_any_number_of_experts(num_experts: int, top_k: int) -> None:
    layer = layer_of(num_experts=num_experts, top_k=top_k)
    x = tokens().requires_grad_()
    y = layer(x)
    scores = (x.reshape(-1, 16) @ layer.router.weight.t()).softmax(-1)
    gate, choice = scores.topk(top_k)
    expected = torch.zeros(18, 16)
    for token in range(18):
        for k in range(top_k):
            f = layer.experts.values(int(choice[token, k]))
            row = x.reshape(-1, 16)[token]
            hidden = nn.functional.silu(row @ f["w_gate"]) * (row @ f["w_up"])
            expected[token] += gate[token, k] * (hidden @ f["w_down"])
    torch.testing.assert_close(y.reshape(-1, 16), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert int(layer.context.counts_E.sum()) == 18 * top_k


def test_the_dispatcher_takes_views() -> None:
    x = torch.randn(8, 10).t()[:, ::2]
    choice = torch.rand(10, 6).sort(dim=1).indices[:, 1:4]
    gate = torch.rand(3, 10).t()
    assert not any(t.is_contiguous() for t in (x, choice, gate))

    def body(exchange: Exchange, straight: bool) -> tuple[Tensor, Tensor]:
        table = RoutingTable.from_plan_arrays([[0, 1, 2], [3, 4, 5]], rank=exchange.rank)
        dispatcher = Dispatcher(table, exchange=exchange)
        given = [t.contiguous() if straight else t for t in (x, choice, gate)]
        rows = given[0].detach().requires_grad_()
        arrived = dispatcher.dispatch(rows, given[1]).map(lambda slot, r: (slot + 2) * r)
        y = dispatcher.combine(arrived, given[2])
        y.t().square().sum().backward()
        assert rows.grad is not None
        return y.detach(), rows.grad

    found = [run_ranks(lambda e, s=s: body(e, s), size=2) for s in (True, False)]
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Counted:
    """Counts the graphs that are alive, by a hook object that each forward leaves in its graph."""

    alive = 0

    def __init__(self) -> None:
        Counted.alive += 1

    def __call__(self, grad: Tensor) -> None: ...

    def __del__(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("differentiates", [True, False])
def test_forwards_whose_balancing_loss_nobody_takes_keep_no_graph(differentiates: bool) -> None:
    layer, embed = layer_of(), nn.Linear(16, 16)
    Counted.alive = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            x = embed(tokens(step))
            x.register_hook(Counted())
            loss = layer(x).square().sum()
            if differentiates:
                loss.backward()
            del x, loss
            gc.collect()
            assert Counted.alive <= 1
    said = [str(w.message) for w in caught if "balancing loss" in str(w.message)]
    assert len(said) == 1
    assert "add take_auxiliary(model) to the loss" in said[0]


def test_the_balancing_loss_is_the_same_for_those_who_take_it() -> None:
    layer = layer_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = layer(tokens(0)), layer(tokens(1))  # one layer, used twice in a model
        both = take_auxiliary(layer)
        assert both is not None
        (first.sum() + second.sum() + both).backward()
        parts = []
        for seed in (0, 1):
            layer(tokens(seed)).sum().backward(retain_graph=True)
            part = take_auxiliary(layer)
            assert part is not None
            parts.append(part)
        assert take_auxiliary(layer) is None
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_a_copy_of_a_layer_that_ran_is_independent() -> None:
    layer = layer_of(balance="bias")
    loss = layer(tokens()).square().sum()
    copies = [copy.deepcopy(layer), AveragedModel(layer).module]
    loss.backward()
    before = layer.context.counts_E.clone()
    for one in copies:
        assert isinstance(one, MoELayer)
        assert torch.equal(one(tokens()), layer_of(balance="bias")(tokens()))
        assert one.context is not layer.context
        assert one.experts.weight.grad is None
        with torch.no_grad():
            one.experts.weight.mul_(2.0)
    assert torch.equal(layer.context.counts_E, before)
    assert torch.equal(layer.experts.weight, layer_of(balance="bias").experts.weight)
    average = AveragedModel(layer)
    average.update_parameters(layer)


def test_the_logits_of_the_router_are_there_for_a_loss_of_ones_own() -> None:
    layer = layer_of(balance="none")
    y, logits = layer(tokens(), return_logits=True)
    assert logits.shape == (2, 9, 6)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, layer.router(tokens()))
    torch.testing.assert_close(y, layer(tokens()))
    torch.logsumexp(logits, -1).square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens(), return_logits=True)[1].dtype == torch.float32


def test_a_layer_of_the_meta_device_runs_when_it_gets_memory() -> None:
    with torch.device("meta"):
        layer = layer_of(balance="bias", num_shared=1)
    context = layer.context
    assert not context.counts_E.is_meta
    assert not context.expected_E.is_meta
    layer.to_empty(device="cpu")
    for module in (*layer.children(), layer):
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    layer(tokens()).sum().backward()
    assert int(context.counts_E.sum()) == 36
    assert layer.router_bias is not None
    assert not layer.router_bias.any()
    assert 0.1 < float(layer.router.weight.detach().std()) < 0.5
    with torch.device("meta"), deferred_experts():
        bank = layer_of().experts
        nn.init.ones_(bank.weight)
    bank.allocate(num_slots=1, device="cpu")
    bank.assign(0, 3)
    bank.initialise(0)
    assert torch.equal(bank.values(0)["w_up"], bank.initial(3)["w_up"])


def second_order(exchange: Exchange) -> None:
    table = RoutingTable.from_plan_arrays([[0, 1], [1, 0]][: exchange.size], rank=exchange.rank)
    dispatcher = Dispatcher(table, exchange=exchange)
    x = torch.randn(4, 8, requires_grad=True)
    arrived = dispatcher.dispatch(x, torch.zeros(4, 1, dtype=torch.int64))
    y = dispatcher.combine(arrived.map(lambda slot, rows: rows**3), torch.ones(4, 1))
    torch.autograd.grad(y.sum(), x, create_graph=True)


def test_second_order_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"second-order gradients .* are not supported"):
        second_order(SoloExchange())
    layer, x = layer_of(), tokens().requires_grad_()
    with pytest.raises(RuntimeError, match=r"second-order gradients .* are not supported"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        run_ranks(second_order, size=2, timeout_s=10)


class Block(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.into, self.moe = nn.Linear(16, 16), layer_of(**settings)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(torch.relu(self.into(x)))
        return y * 2


def compiled(exchange: Exchange) -> list[str]:
    """Forward and backward of a compiled model over real processes; returns what was complained of.

    Raises:
        AssertionError: The compiled model gives other numbers.
    """
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch").addHandler(handler)
    found = []
    for compiles in (False, True):
        block = Block(num_experts=2, top_k=1)
        table = RoutingTable.from_plan_arrays([[0, -1], [1, -1]], rank=exchange.rank)
        block.moe.experts.allocate(num_slots=1, device="cpu")
        block.moe.experts.assign(0, exchange.rank)
        block.moe.experts.initialise(0)
        block.moe.attach(LayerContext(layer=0, exchange=exchange, table=table))
        run = torch.compile(block, backend="aot_eager") if compiles else block
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in (1, 2):
                x = tokens(seed + exchange.rank)
                run(x).square().sum().backward()
        said += [str(w.message) for w in caught if "balancing" not in str(w.message)]
        found.append(block)
    for one, other in zip(*(block.parameters() for block in found), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    return said


@pytest.mark.slow
def test_a_compiled_model_runs_over_processes() -> None:
    assert run_processes(compiled, size=2) == [[], []]


def test_a_compiled_model_breaks_its_graph_at_the_experts() -> None:
    block = Block(balance="none")
    run = torch.compile(block, backend="eager")
    x = tokens()
    torch.testing.assert_close(run(x), block(x))
    dispatcher = Dispatcher(RoutingTable.solo(2), exchange=SoloExchange())

    def through(x_TD: Tensor) -> Tensor:
        arrived = dispatcher.dispatch(x_TD * 2, torch.zeros(4, 1, dtype=torch.int64))
        return dispatcher.combine(arrived, torch.ones(4, 1)) + 1

    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(through, backend="eager")(x), 2 * x + 1)

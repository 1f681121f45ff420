"""Slots in an order of their own: gradients are those of one process that holds every expert."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dispatcher import (
    Dispatcher,
    Exchange,
    ExpertLayout,
    PathOptions,
    RoutingTable,
    SplitRule,
    expert_path,
    route,
    run_ranks,
    slots_for_exchange,
    sum_replica_gradients,
)
from dispatcher.reference import dense_moe, expert_output

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EXPERTS, DIM, TOKENS = 8, 12, 40
LAYOUT = ExpertLayout(activation="gelu", dim=DIM, hidden=21, bias=True)
ROWS = torch.randn(EXPERTS, LAYOUT.row_numel, generator=torch.Generator().manual_seed(0)) / 4


def table_of(exchange: Exchange) -> RoutingTable:
    """Every expert on two neighbours, in the order in which experts come."""
    rows: list[list[int]] = [[] for _ in range(exchange.size)]
    for expert in range(EXPERTS):
        for i in range(2):
            rows[(expert + i) % exchange.size].append(expert)
    width = max(map(len, rows))
    return RoutingTable.from_plan_arrays(
        [row + [-1] * (width - len(row)) for row in rows], rank=exchange.rank
    )


def seated(exchange: Exchange) -> tuple[RoutingTable, tuple[int, ...], Tensor]:
    """The table, the order of this rank's slots, and their rows."""
    table = table_of(exchange)
    order = slots_for_exchange(table)
    return table, order, ROWS[[max(e, 0) for e in order]].clone().requires_grad_()


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(TOKENS, DIM, generator=random)
    gate, choice = torch.rand(TOKENS, EXPERTS, generator=random).topk(2)
    return x.requires_grad_(), choice, gate


def reference(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradients of tokens and gradients of experts, by one process."""
    x, choice, gate = (torch.cat(c) for c in zip(*map(tokens_of, range(size)), strict=True))
    x, leaf = x.detach().double().requires_grad_(), ROWS.double().requires_grad_()
    fields = [LAYOUT.views(row) for row in leaf]
    y = dense_moe(x, choice, gate.double(), fields, activation=LAYOUT.activation)
    y.square().sum().backward()
    assert x.grad is not None
    assert leaf.grad is not None
    return y.detach(), x.grad, leaf.grad


def check(size: int, found: list[tuple[tuple[int, ...], Tensor, Tensor, Tensor]]) -> None:
    expected_y, expected_x, expected_rows = reference(size)
    mixed = False
    for rank, (order, y, grad_x, grad_rows) in enumerate(found):
        mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
        close(y, expected_y[mine])
        close(grad_x, expected_x[mine])
        mixed |= list(order) != sorted(order)
        for slot, expert in enumerate(order):
            if expert >= 0:
                close(grad_rows[slot], expected_rows[expert])
    assert mixed  # the order is another than the table's


def close(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("mode", ["home", "shares", "balanced"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_closed_path_follows_the_order_of_the_slots(size: int, mode: str) -> None:
    def body(exchange: Exchange) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
        table, order, bank = seated(exchange)
        x, choice, gate = tokens_of(exchange.rank)
        bank.grad = torch.full_like(bank, torch.nan)  # left behind by another step
        written: set[int] = set()
        routed = route(
            x, choice, table=table, exchange=exchange, rule=SplitRule(mode=mode),
            expert_of_slot=order,
        )  # fmt: skip
        y = expert_path(x, gate, bank, routed, PathOptions(layout=LAYOUT), written=written)
        y.square().sum().backward()
        assert x.grad is not None
        sum_replica_gradients(
            bank.grad, table, exchange, served_ER=routed.split.served_ER, expert_of_slot=order,
            written=written,
        )  # fmt: skip
        return order, y.detach(), x.grad, bank.grad

    check(size, run_ranks(body, size=size, timeout_s=20))


@pytest.mark.parametrize("size", [2, 3])
def test_the_open_face_follows_the_order_of_the_slots(size: int) -> None:
    def body(exchange: Exchange) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
        table, order, bank = seated(exchange)
        x, choice, gate = tokens_of(exchange.rank)
        dispatcher = Dispatcher(table, exchange=exchange, expert_of_slot=order)
        assert dispatcher.expert_of_slot == order

        def expert(slot: int, rows: Tensor) -> Tensor:
            return expert_output(rows, LAYOUT.views(bank[slot]), activation=LAYOUT.activation)

        y = dispatcher.combine(dispatcher.dispatch(x, choice).map(expert), gate)
        y.square().sum().backward()
        assert x.grad is not None
        assert bank.grad is not None
        sum_replica_gradients(bank.grad, table, exchange, expert_of_slot=order)
        return order, y.detach(), x.grad, bank.grad

    check(size, run_ranks(body, size=size, timeout_s=20))


def test_an_update_goes_back_to_the_tables_order_unless_told() -> None:
    table = RoutingTable.solo(3)
    exchange = run_ranks(lambda e: e, size=1)[0]
    dispatcher = Dispatcher(table, exchange=exchange, expert_of_slot=[2, 0, 1])
    ids = torch.tensor([[1]])
    assert dispatcher.dispatch(torch.ones(1, 4), ids).groups[0].slot == 2
    dispatcher.update(table)
    assert dispatcher.dispatch(torch.ones(1, 4), ids).groups[0].slot == 1
    dispatcher.update(table, expert_of_slot=[1, 0, 2])
    assert dispatcher.dispatch(torch.ones(1, 4), ids).groups[0].slot == 0


class Watched:
    """An exchange that keeps the replica gradients it sends."""

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.sent: list[Tensor] = []

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if label == "replica_grad":
            self.sent.append(input.detach().clone())
        self.inner.all_to_all(output, input, label=label, **kwargs)

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self.inner, name)


def test_the_scaling_benchmark_sends_the_rows_that_its_backward_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    module = importlib.import_module("dispatch_scaling")
    work = module.Work(tokens=128, dim=16)

    def body(exchange: Exchange) -> list[Tensor]:
        watched = Watched(exchange)
        module.layer_step(watched, work)()
        return watched.sent

    for sent in run_ranks(body, size=2, timeout_s=20):
        rows = torch.cat(sent).view(-1, work.layout.row_numel)
        assert rows.shape[0] == work.experts // 2
        assert rows.any(dim=1).all()

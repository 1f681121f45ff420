"""Equal state gives equal bits: repeats, placements, replicas, and both faces of the dispatcher."""

from __future__ import annotations

import numpy as np
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
from dispatcher.layer.compute import experts_forward
from dispatcher.processes import run_processes

RANKS, EXPERTS, DIM = 4, 8, 32
LAYOUT = ExpertLayout(activation="gelu", dim=DIM, hidden=64, bias=True)
ROWS = torch.randn(EXPERTS, LAYOUT.row_numel, generator=torch.Generator().manual_seed(0)) / 4

PLACEMENTS = {
    "one replica": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "two": [[0, 1, 6, 7], [0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]],
    "three, turned": [
        [7, 6, 5, 4, 1, 0],
        [3, 2, 1, 0, 5, 4],
        [7, 6, 3, 2, 1, 0],
        [7, 6, 5, 4, 3, 2],
    ],
    "all but one": [[], list(range(8)), list(range(8)), list(range(8))],
}


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(50, DIM, generator=random)
    score = torch.rand(50, EXPERTS, generator=random)
    score[:, 3] += 0.5  # one hot expert
    gate, choice = score.topk(2)
    return x, choice, gate


def step(exchange: Exchange, name: str, mode: str) -> tuple[np.ndarray, ...]:
    width = max(len(row) for row in PLACEMENTS[name])
    slots = [[*row, *[-1] * (width - len(row))] for row in PLACEMENTS[name]]
    table = RoutingTable.from_plan_arrays(slots, rank=exchange.rank)
    x, choice, gate = tokens_of(exchange.rank)
    x.requires_grad_()
    gate.requires_grad_()
    weight = ROWS[[max(e, 0) for e in table.slots_of(exchange.rank)]].clone().requires_grad_()
    routed = route(x, choice, table=table, exchange=exchange, rule=SplitRule(mode=mode))
    y = expert_path(x, gate, weight, routed, PathOptions(layout=LAYOUT))
    y.square().sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    assert gate.grad is not None
    sum_replica_gradients(weight.grad, table, exchange, served_ER=routed.split.served_ER)
    by_expert = np.zeros((EXPERTS, LAYOUT.row_numel), dtype=np.float32)
    for slot, expert in enumerate(table.slots_of(exchange.rank)):
        if expert >= 0:
            by_expert[expert] = weight.grad[slot].numpy()
    return y.detach().numpy(), x.grad.numpy(), gate.grad.numpy(), by_expert


def world(name: str, mode: str) -> list[tuple[np.ndarray, ...]]:
    return run_ranks(lambda exchange: step(exchange, name, mode), size=RANKS)


def equal(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["home", "shares", "balanced"])
def test_the_same_step_gives_the_same_bits(mode: str) -> None:
    first, second = world("two", mode), world("two", mode)
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("mode", ["home", "shares", "balanced"])
def test_placement_and_split_change_no_bit_of_outputs_and_token_gradients(
    name: str, mode: str
) -> None:
    expected, found = world("one replica", "home"), world(name, mode)
    for a, b in zip(expected, found, strict=True):
        assert equal(a[:3], b[:3])


@pytest.mark.parametrize("name", PLACEMENTS)
def test_in_home_mode_weight_gradients_are_the_same_bits_too(name: str) -> None:
    expected = np.maximum.reduce([np.abs(r[3]) for r in world("one replica", "home")])
    found = np.maximum.reduce([np.abs(r[3]) for r in world(name, "home")])
    assert np.array_equal(expected, found)


def test_gloo_processes_repeat_the_bits_of_the_loopback() -> None:
    for name, mode in [("two", "home"), ("three, turned", "balanced")]:
        real = run_processes(step, size=RANKS, args=(name, mode))
        assert all(equal(a, b) for a, b in zip(real, world(name, mode), strict=True))


def test_the_open_face_computes_what_the_closed_path_does() -> None:
    def body(exchange: Exchange) -> tuple[Tensor, Tensor]:
        table = RoutingTable.from_plan_arrays(PLACEMENTS["two"], rank=exchange.rank)
        x, choice, gate = tokens_of(exchange.rank)
        x.requires_grad_()
        weight = ROWS[list(table.slots_of(exchange.rank))]
        dispatcher = Dispatcher(table, exchange=exchange)
        arrived = dispatcher.dispatch(x, choice)
        fields = [LAYOUT.views(row) for row in weight]

        def expert(slot: int, rows: Tensor) -> Tensor:
            f = fields[slot]
            hidden = torch.nn.functional.gelu(rows @ f["w_in"] + f["b_in"])
            return hidden @ f["w_out"] + f["b_out"]

        y = dispatcher.combine(arrived.map(expert), gate)
        y.square().sum().backward()
        assert x.grad is not None
        closed, _ = experts_forward(arrived.rows_MD.detach(), weight, arrived.groups, LAYOUT)
        torch.testing.assert_close(arrived.map(expert).rows_MD, closed, rtol=1e-5, atol=1e-6)
        return y.detach(), x.grad

    for (y, grad), closed in zip(run_ranks(body, size=RANKS), world("two", "home"), strict=True):
        np.testing.assert_allclose(y.numpy(), closed[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grad.numpy(), closed[1], rtol=1e-4, atol=1e-4)


class Counted:
    """An exchange that notes every call."""

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.rank, self.size, self.calls = inner, inner.rank, inner.size, []

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        def call(*args, label: str, **kwargs):  # type: ignore[no-untyped-def]
            self.calls.append(label)
            return getattr(self.inner, name)(*args, label=label, **kwargs)

        return call


def test_a_layer_needs_five_collectives_and_idle_replicas_send_nothing() -> None:
    def body(exchange: Exchange) -> list[str]:
        counted = Counted(exchange)
        step(counted, "two", "home")  # type: ignore[arg-type]
        return counted.calls

    for calls in run_ranks(body, size=RANKS):
        assert calls == [
            "counts", "dispatch", "combine", "combine_grad", "dispatch_grad", "replica_grad",
        ]  # fmt: skip


def test_without_replicas_no_gradient_travels() -> None:
    def body(exchange: Exchange) -> list[str]:
        counted = Counted(exchange)
        step(counted, "one replica", "home")  # type: ignore[arg-type]
        return counted.calls

    assert all("replica_grad" not in calls for calls in run_ranks(body, size=RANKS))


class Straight:
    """An exchange that notes where the replica gradients lie."""

    def __init__(self, inner: Exchange, grad: Tensor) -> None:
        self.inner, self.grad, self.rank, self.size = inner, grad, inner.rank, inner.size
        self.packed: list[bool] = []

    def all_to_all(self, output: Tensor, input: Tensor, **kwargs):  # type: ignore[no-untyped-def]
        ours = self.grad.untyped_storage().data_ptr()
        for side in (output, input):
            if side.numel():
                self.packed.append(side.untyped_storage().data_ptr() != ours)
        self.inner.all_to_all(output, input, **kwargs)


def test_two_replicas_in_exchange_order_need_no_packing_and_give_the_same_bits() -> None:
    def body(exchange: Exchange) -> tuple[list[bool], dict[int, Tensor], dict[int, Tensor]]:
        table = RoutingTable.from_plan_arrays(PLACEMENTS["two"], rank=exchange.rank)
        found = []
        for order in (table.slots_of(exchange.rank), slots_for_exchange(table)):
            grad = torch.stack([ROWS[e] * (table.home_E[e] == exchange.rank) for e in order])
            watch = Straight(exchange, grad)
            sum_replica_gradients(grad, table, watch, expert_of_slot=order)  # type: ignore[arg-type]
            found.append((watch.packed, dict(zip(order, grad, strict=True))))
        return found[1][0], found[0][1], found[1][1]

    for packed, plain, ordered in run_ranks(body, size=RANKS):
        assert packed == [False, False]
        for expert, row in plain.items():
            assert torch.equal(row, ROWS[expert])
            assert torch.equal(row, ordered[expert])


def gradients(exchange: Exchange, overlapped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Dense and expert gradients brought together one after the other, or both at once."""
    table = RoutingTable.from_plan_arrays(PLACEMENTS["two"], rank=exchange.rank)
    random = torch.Generator().manual_seed(exchange.rank)
    dense = torch.randn(100_000, generator=random)
    rows = torch.randn(len(table.slots_of(exchange.rank)), LAYOUT.row_numel, generator=random)
    served = table.holds_ER.copy()  # every replica served: slices are exchanged too
    pending = exchange.start_all_reduce(dense, label="dense_grad")
    if not overlapped:
        pending.wait()
    sum_replica_gradients(rows, table, exchange, served_ER=served)
    pending.wait()
    return dense.numpy(), rows.numpy()


def test_overlapped_gradients_are_the_same_bits_as_one_after_the_other() -> None:
    apart = run_processes(gradients, size=RANKS, args=(False,))
    together = run_processes(gradients, size=RANKS, args=(True,))
    assert all(equal(a, b) for a, b in zip(apart, together, strict=True))

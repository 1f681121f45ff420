"""Replicas' gradients: who sends, in which order parts are summed, and that all end up alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import Exchange, RoutingTable, flat_all_reduce, run_ranks, sum_replica_gradients
from dispatcher.reference import gradients_sent

SLOTS = [[0, 1], [1, 2], [1, 0], [2, 1]]
WIDTH = 37  # not a multiple of anything: slices differ in length


def part(expert: int, rank: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(10 * expert + rank))


def served(**ranks: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((3, 4), dtype=np.bool_)
    for name, serving in ranks.items():
        out[int(name[1:]), list(serving)] = True
    return out


def summed(served_ER: np.ndarray, *, stale: bool = False) -> list[dict[int, Tensor]]:
    def body(exchange: Exchange) -> dict[int, Tensor]:
        table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
        held = table.slots_of(exchange.rank)
        grad = torch.stack([part(e, exchange.rank) for e in held])
        written = {s for s, e in enumerate(held) if served_ER[e, exchange.rank]}
        for slot in set(range(len(held))) - written:
            if not stale:
                grad[slot] = 0
        sum_replica_gradients(
            grad, table, exchange, served_ER=served_ER, written=written if stale else None
        )
        return dict(zip(held, grad, strict=True))

    return run_ranks(body, size=4)


@pytest.mark.parametrize("serving", [(0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)])
def test_parts_are_summed_in_ascending_rank_order_and_reach_every_replica(
    serving: tuple[int, ...],
) -> None:
    expected = part(1, serving[0])
    for rank in serving[1:]:
        expected = expected + part(1, rank)
    for rows in summed(served(e0=(2,), e1=serving, e2=(1, 3))):
        assert torch.equal(rows[1], expected)
        if 0 in rows:
            assert torch.equal(rows[0], part(0, 2))
        if 2 in rows:
            assert torch.equal(rows[2], part(2, 1) + part(2, 3))


def test_what_an_abandoned_step_left_is_zeroed_where_none_served() -> None:
    for rows in summed(served(e1=(0, 1)), stale=True):
        assert torch.equal(rows[1], part(1, 0) + part(1, 1))
        assert all(not row.any() for expert, row in rows.items() if expert != 1)


def test_a_served_expert_whose_backward_never_ran_has_no_gradient() -> None:
    def body(exchange: Exchange) -> Tensor:
        table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
        grad = torch.full((2, WIDTH), torch.nan)
        sum_replica_gradients(
            grad, table, exchange, served_ER=served(e0=(2,), e1=(0, 3), e2=(1,)), written=set()
        )
        return grad

    assert not torch.stack(run_ranks(body, size=4)).any()


def test_the_cost_model_counts_the_gradients_that_are_really_sent() -> None:
    served_ER = served(e0=(2,), e1=(0, 2, 3), e2=(1, 3))
    sent = [0] * 4

    class Counting:
        def __init__(self, inner: Exchange) -> None:
            self.inner, self.rank, self.size = inner, inner.rank, inner.size

        def all_to_all(self, output: Tensor, input: Tensor, **kwargs) -> None:  # type: ignore[no-untyped-def]
            sent[self.rank] += input.numel()
            self.inner.all_to_all(output, input, **kwargs)

    def body(exchange: Exchange) -> None:
        table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
        grad = torch.zeros(2, 36)
        sum_replica_gradients(grad, table, Counting(exchange), served_ER=served_ER)  # type: ignore[arg-type]

    run_ranks(body, size=4)
    table = RoutingTable.from_plan_arrays(SLOTS, rank=0)
    assert sent == pytest.approx(36 * gradients_sent(served_ER, table))


def test_a_flat_buffer_is_summed_alike_everywhere() -> None:
    def body(exchange: Exchange) -> Tensor:
        flat = torch.full((5,), float(exchange.rank + 1))
        flat_all_reduce(flat, exchange)
        return flat

    assert all(flat.tolist() == [6.0] * 5 for flat in run_ranks(body, size=3))

"""Bad input is a clear error on every rank, and nobody waits for rows that never come."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import (
    Dispatcher,
    DispatchInputError,
    Exchange,
    HandleError,
    PeerInputError,
    RoutingTable,
    RoutingTableError,
    run_ranks,
    within_machine,
)
from dispatcher.processes import run_processes

SLOTS = [[0, 1], [1, 2], [2, 0]]

BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "dtype": (lambda: (torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int32)), "wrong dtype"),
    "tokens": (lambda: (torch.ones(4, 8).long(), torch.zeros(4, 1).long()), "wrong dtype"),
    "shape": (lambda: (torch.ones(4, 8), torch.zeros(3, 1).long()), "do not fit"),
    "top-k": (lambda: (torch.ones(4, 8), torch.zeros(4, 9).long()), "top-k exceeds"),
    "layout": (lambda: (torch.ones(8, 4).t(), torch.zeros(4, 1).long()), "not contiguous"),
    "too high": (lambda: (torch.ones(4, 8), torch.full((4, 1), 3)), r"out of range.*ids 3\.\.3"),
    "too low": (lambda: (torch.ones(4, 8), torch.full((4, 1), -2)), r"out of range.*ids -2"),
}


def one_bad_rank(exchange: Exchange, name: str) -> str:
    """Rank 1 is handed bad input, the others good; each says what it met."""
    table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
    dispatcher = Dispatcher(table, exchange=exchange)
    x, ids = torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64)
    if exchange.rank == 1:
        x, ids = BAD[name][0]()
    try:
        dispatcher.dispatch(x, ids)
    except (DispatchInputError, PeerInputError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("name", BAD)
def test_one_ranks_bad_input_is_an_error_on_all(name: str) -> None:
    first, second, third = run_ranks(lambda e: one_bad_rank(e, name), size=3, timeout_s=10)
    with pytest.raises(DispatchInputError, match=BAD[name][1]):
        raise DispatchInputError(second)
    assert second.startswith("DispatchInputError")
    assert first == third
    assert first.startswith("PeerInputError: rank 1 refused its input")


def one_bad_rank_of_a_machine(exchange: Exchange, name: str) -> str:
    return one_bad_rank(within_machine(exchange, timeout_s=20), name)


@pytest.mark.parametrize("body", [one_bad_rank, one_bad_rank_of_a_machine])
def test_the_same_on_real_processes_without_a_hang(body: Callable[..., str]) -> None:
    said = run_processes(body, size=3, args=("too high",), timeout_s=20)
    assert [line.split(":")[0] for line in said] == [
        "PeerInputError",
        "DispatchInputError",
        "PeerInputError",
    ]


def solo() -> Dispatcher:
    return Dispatcher(RoutingTable.solo(3), exchange=run_ranks(lambda e: e, size=1)[0])


def test_a_handle_serves_once() -> None:
    dispatcher = solo()
    handle = dispatcher.dispatch(torch.ones(2, 4), torch.tensor([[0], [2]]))
    weight = torch.ones(2, 1)
    assert torch.equal(dispatcher.combine(handle, weight), torch.ones(2, 4))
    with pytest.raises(HandleError, match=r"already combined \(handle of generation 0\)"):
        dispatcher.combine(handle, weight)


def test_a_handle_of_another_generation_is_refused_and_named() -> None:
    dispatcher = solo()
    handle = dispatcher.dispatch(torch.ones(2, 4), torch.tensor([[0], [2]]))
    dispatcher.update(RoutingTable.from_plan_arrays(np.arange(3)[None, :], rank=0, generation=7))
    with pytest.raises(HandleError, match="at generation 7 .handle of generation 0"):
        dispatcher.combine(handle, torch.ones(2, 1))


def test_a_function_that_loses_rows_is_caught() -> None:
    dispatcher = solo()
    handle = dispatcher.dispatch(torch.ones(2, 4), torch.tensor([[0], [2]]))
    with pytest.raises(ValueError, match="1 rows for a dispatch of 2"):
        handle.with_rows(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("slots", "shares", "home", "message"),
    [
        ([[0, 2]], None, None, "no rank holds expert 1"),
        ([[0], [1]], [[1, 0], [0, 1], [0, 1]], None, "no rank holds expert 2"),
        ([[0, 0]], None, None, "two slots of rank 0"),
        ([[0], [1]], [[0.5, 0.5], [0, 1]], None, "lies on a rank without"),
        ([[0], [1]], [[0.9, 0], [0, 1]], None, "sum to 0.9"),
        ([[0], [1]], None, [1, 1], "home of expert 0 is rank 1"),
        ([[0], [1]], None, [0, 5], "home of expert 1 is rank 5"),
        ([0, 1], None, None, r"must be \[ranks, slots\]"),
        ([[0, 1], [-2, 0]], None, None, "slots name experts -2"),
    ],
)
def test_a_table_that_cannot_route_is_refused(
    slots: object, shares: object, home: object, message: str
) -> None:
    with pytest.raises(RoutingTableError, match=message):
        RoutingTable.from_plan_arrays(slots, shares, rank=0, home_E=home)


def test_table_and_exchange_of_different_worlds_do_not_mix() -> None:
    exchange = run_ranks(lambda e: e, size=1)[0]
    with pytest.raises(ValueError, match="rank 0 of 3, the exchange is rank 0 of 1"):
        Dispatcher(RoutingTable.from_plan_arrays(SLOTS, rank=0), exchange=exchange)


def test_errors_survive_pickling() -> None:
    sent = pickle.dumps(PeerInputError(rank=3, reason="why"))
    error = pickle.loads(sent)  # noqa: S301 - what Ray does with it
    assert (error.rank, error.reason) == (3, "why")
    assert "rank 3 refused its input (why)" in str(error)

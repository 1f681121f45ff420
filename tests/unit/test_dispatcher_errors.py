"""Bad input is a clear error on every rank, and nobody waits for rows that never come."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import (
    Dispatcher,
    DispatchInputError,
    Exchange,
    ExpertLayout,
    HandleError,
    PathOptions,
    PeerInputError,
    RankMismatchError,
    RoutingTable,
    RoutingTableError,
    expert_path,
    route,
    run_ranks,
    within_machine,
)
from dispatcher.exchange import Done
from dispatcher.processes import run_processes

SLOTS = [[0, 1], [1, 2], [2, 0]]

BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "dtype": (lambda: (torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int32)), "wrong dtype"),
    "tokens": (lambda: (torch.ones(4, 8).long(), torch.zeros(4, 1).long()), "wrong dtype"),
    "shape": (lambda: (torch.ones(4, 8), torch.zeros(3, 1).long()), "do not fit"),
    "top-k": (lambda: (torch.ones(4, 8), torch.zeros(4, 9).long()), "top-k exceeds"),
    "no choice": (lambda: (torch.ones(4, 8), torch.zeros(4, 0).long()), "top-k is 0"),
    "device": (
        lambda: (torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64, device="meta")),
        "different devices",
    ),
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


ODD: dict[str, tuple[Callable[[], Tensor], int, str]] = {
    "width": (lambda: torch.ones(4, 16), 0, "width: 8 on ranks 0, 2; 16 on rank 1"),
    "dtype": (
        lambda: torch.ones(4, 8, dtype=torch.bfloat16),
        0,
        "element type: torch.float32 on ranks 0, 2; torch.bfloat16 on rank 1",
    ),
    "nothing but a width": (lambda: torch.ones(0, 7), 0, "width: 8 on ranks 0, 2; 7 on rank 1"),
    "generation": (lambda: torch.ones(4, 8), 6, "generation: 5 on ranks 0, 2; 6 on rank 1"),
}


def one_odd_rank(exchange: Exchange, name: str) -> str:
    """Rank 1 has good input, but of another kind than the others; each says what it met."""
    x, generation = torch.ones(4, 8), 5
    if exchange.rank == 1:
        make, generation, _ = ODD[name]
        x, generation = make(), generation or 5
    table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank, generation=generation)
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    try:
        Dispatcher(table, exchange=exchange).dispatch(x, ids)
    except RankMismatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ODD)
def test_ranks_that_do_not_fit_each_other_all_raise(name: str) -> None:
    said = run_ranks(lambda e: one_odd_rank(e, name), size=3, timeout_s=10)
    assert said == [f"ranks differ in {ODD[name][2]}; nothing was dispatched"] * 3


def test_ranks_that_do_not_fit_each_other_all_raise_on_real_processes() -> None:
    said = run_processes(one_odd_rank, size=3, args=("dtype",), timeout_s=20)
    assert said == [f"ranks differ in {ODD['dtype'][2]}; nothing was dispatched"] * 3


def test_a_rank_whose_slots_miss_an_expert_is_an_error_on_all() -> None:
    def body(exchange: Exchange) -> str:
        table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
        slots = [[0, 1], [2, -1], [0, 2]][exchange.rank]
        x, ids = torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64)
        try:
            route(x, ids, table=table, exchange=exchange, expert_of_slot=slots)
        except (DispatchInputError, PeerInputError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    first, second, third = run_ranks(body, size=3, timeout_s=10)
    assert second.startswith("DispatchInputError: the slots hold an expert twice, or not all")
    assert second.endswith("slots (2, -1)")
    assert first == third
    assert first.startswith("PeerInputError: rank 1 refused its input")


class NoRows:
    """An exchange that fails the test at the first row it should carry."""

    rank, size = 0, 1

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Done:
        return Done()

    def all_to_all(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("rows were exchanged")


WRONG_WEIGHTS = {
    "transposed": torch.ones(2, 4),
    "one per token": torch.ones(4),
    "too many tokens": torch.ones(5, 2),
    "integers": torch.ones(4, 2).long(),
    "device": torch.ones(4, 2, device="meta"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_before_any_row_travels(name: str) -> None:
    weight, layout = WRONG_WEIGHTS[name], ExpertLayout(activation="gelu", dim=8, hidden=4)
    x, ids = torch.ones(4, 8), torch.zeros(4, 2, dtype=torch.int64)
    routed = route(x, ids, table=RoutingTable.solo(3), exchange=NoRows())  # type: ignore[arg-type]
    bank = torch.ones(3, layout.row_numel)
    with pytest.raises(DispatchInputError, match=r"weights must be floats \(4, 2\) on cpu"):
        expert_path(x, weight, bank, routed, PathOptions(layout=layout))
    dispatcher = solo()
    handle = dispatcher.dispatch(x, ids)
    with pytest.raises(DispatchInputError, match=r"weights must be floats \(4, 2\) on cpu"):
        dispatcher.combine(handle, weight)
    assert dispatcher.combine(handle, torch.ones(4, 2)).shape == (4, 8)  # it was not spent


@pytest.mark.parametrize(
    ("x", "bank", "message"),
    [
        (torch.ones(4, 9), torch.ones(3, 64), r"tokens \(4, 8\).* were routed, got \(4, 9\)"),
        (torch.ones(4, 8).double(), torch.ones(3, 64), "got .* torch.float64"),
        (torch.ones(4, 8), torch.ones(3, 80), r"bank \(3, 80\) for a layout"),
        (torch.ones(4, 8), torch.ones(0, 64), "at least 1 slots"),
    ],
)
def test_tokens_and_banks_that_do_not_fit_are_refused_before_any_row_travels(
    x: Tensor, bank: Tensor, message: str
) -> None:
    layout = ExpertLayout(activation="gelu", dim=8, hidden=4)
    ids = torch.zeros(4, 1, dtype=torch.int64)
    routed = route(torch.ones(4, 8), ids, table=RoutingTable.solo(3), exchange=NoRows())  # type: ignore[arg-type]
    with pytest.raises(DispatchInputError, match=message):
        expert_path(x, torch.ones(4, 1), bank, routed, PathOptions(layout=layout))


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


def never_returns(exchange: Exchange) -> None:
    threading.Event().wait()


def test_ranks_that_do_not_return_in_time_are_named_and_ended() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 has not returned after 0\.5 s"):
        run_processes(never_returns, size=2, limit_s=0.5)
    assert multiprocessing.active_children() == []


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
    sent = pickle.dumps(RankMismatchError(what="width", values=["8", "9"]))
    mismatch = pickle.loads(sent)  # noqa: S301 - the same
    assert (mismatch.what, mismatch.values) == ("width", ("8", "9"))
    assert "width: 8 on rank 0; 9 on rank 1" in str(mismatch)

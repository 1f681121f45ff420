"""Output and all gradients equal the dense reference, whatever the placement and the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_worlds import CASES, Case, check, one_rank
from hypothesis import given, settings

from dispatcher import Exchange, SharedExchange, run_ranks, within_machine
from dispatcher.processes import run_processes


@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_output_and_gradients_equal_the_dense_reference(case: Case) -> None:
    check(case, run_ranks(lambda exchange: one_rank(exchange, case), size=case.ranks))


def one_process(
    exchange: Exchange, cases: list[Case], transport: str
) -> list[tuple[np.ndarray, ...]]:
    """All cases of one world size, as arrays: they cross a pipe."""
    if transport == "shared memory":
        exchange = within_machine(exchange)
        assert isinstance(exchange, SharedExchange)
    return [tuple(t.numpy() for t in one_rank(exchange, case)) for case in cases]


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 7))]
)
def test_the_same_over_real_processes(ranks: int, transport: str) -> None:
    random = np.random.default_rng(ranks)
    cases = [
        Case(
            ranks=ranks,
            experts=int(random.choice([1, 2, 5, 8, 32])),
            top_k=int(random.choice([1, 2, 8])),
            activation=str(random.choice(["gelu", "gelu_bias", "swiglu"])),
            mode=str(random.choice(["home", "shares", "balanced"])),
            price=float(random.choice([0.0, 5.0])),
            seed=int(random.integers(2**32)),
            hot=bool(random.integers(2)),
            recompute=bool(random.integers(2)),
            overwrite=bool(random.integers(2)),
            hidden=int(random.choice([20, 21])),
        )
        for _ in range(20)
    ]
    by_rank = run_processes(one_process, size=ranks, args=(cases, transport))
    for i, case in enumerate(cases):
        found = [tuple(torch.from_numpy(a) for a in results[i]) for results in by_rank]
        check(case, found)
        loopback = run_ranks(lambda exchange, case=case: one_rank(exchange, case), size=ranks)
        for a, b in zip(found, loopback, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

"""Experts given as a function compute what hand-written ones do; frozen ones get no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_worlds import CASES, DIM, Case, World, close, replicas_agree
from dense_worlds import one_rank as by_hand
from dense_worlds import reference as dense_reference
from dense_worlds import world_of as world_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dispatcher import (
    Exchange,
    PathOptions,
    RoutingTable,
    SplitRule,
    TensorLayout,
    expert_path,
    route,
    run_ranks,
    sum_replica_gradients,
)
from dispatcher.processes import run_processes

SWIGLU = ("w_gate", "w_up", "w_down")
Found = tuple[Tensor, Tensor, Tensor, Tensor]


def swiglu(rows: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """One expert, as a user would write it."""
    hidden = F.silu(rows @ fields["w_gate"]) * (rows @ fields["w_up"])
    return hidden @ fields["w_down"]


def one_rank(exchange: Exchange, case: Case, frozen: tuple[str, ...]) -> Found:
    """Two micro-batches through ``swiglu``, some tensors of which are frozen, in bfloat16."""
    world = world_by_hand(case)
    table = RoutingTable.from_plan_arrays(world.slots, world.shares, rank=exchange.rank)
    x, choice, gate = (t.clone() for t in world.parts[exchange.rank])
    x.requires_grad_()
    gate.requires_grad_()
    fields = world.layout.fields
    trained = TensorLayout({n: s for n, s in fields.items() if n not in frozen}, dim=DIM)
    held_fixed = TensorLayout({n: fields[n] for n in frozen}, dim=DIM)
    held = [max(e, 0) for e in table.slots_of(exchange.rank)]
    weight = torch.zeros(len(held), trained.row_numel)
    fixed = torch.zeros(len(held), held_fixed.row_numel, dtype=torch.bfloat16)
    for slot, expert in enumerate(held):
        given = world.layout.views(world.rows[expert])
        for bank, layout in ((weight, trained), (fixed, held_fixed)):
            for name, view in layout.views(bank[slot]).items():
                view.copy_(given[name])
    weight.requires_grad_(bool(trained.fields))
    before = fixed.clone()
    options = PathOptions(
        layout=trained, frozen_layout=held_fixed if frozen else None, run=swiglu,
        recompute=case.recompute,
    )  # fmt: skip
    served = np.zeros(table.holds_ER.shape, dtype=np.bool_)
    written: set[int] | None = set() if case.overwrite else None
    weight.grad = torch.full_like(weight, torch.nan if case.overwrite else 0.0)
    out = []
    for _ in range(2):
        rule = SplitRule(mode=case.mode, rows_per_replica=case.price)
        routed = route(x, choice, table=table, exchange=exchange, rule=rule, served_ER=served)
        served |= routed.split.served_ER
        y = expert_path(
            x, gate, weight, routed, options, frozen=fixed if frozen else None, written=written
        )
        (y * y).sum().backward()
        out.append(y.detach())
    assert torch.equal(out[0], out[1])
    assert torch.equal(fixed, before)
    assert x.grad is not None
    assert gate.grad is not None
    if trained.fields:
        sum_replica_gradients(weight.grad, table, exchange, served_ER=served, written=written)
    return out[0], x.grad / 2, gate.grad / 2, weight.grad / 2


def rounded(world: World, frozen: tuple[str, ...]) -> Tensor:
    """The experts' rows with the frozen fields as bfloat16 holds them."""
    rows = world.rows.clone()
    for row in rows:
        for name in frozen:
            view = world.layout.views(row)[name]
            view.copy_(view.bfloat16())
    return rows


def check(case: Case, results: list[Found], frozen: tuple[str, ...] = ()) -> None:
    world = world_by_hand(case)
    expected = dense_reference(world.parts, rounded(world, frozen), world.layout)
    fields = {n: s for n, s in world.layout.fields.items() if n not in frozen}
    trained = TensorLayout(fields, dim=DIM)
    at = 0
    for rank, (out, grad_x, grad_gate, grad_weight) in enumerate(results):
        count = out.shape[0]
        close(out, expected[0][at : at + count])
        close(grad_x, expected[1][at : at + count])
        close(grad_gate, expected[2][at : at + count])
        for slot, expert in enumerate(world.slots[rank]):
            if expert >= 0 and fields:
                wanted = world.layout.views(expected[3][expert])
                whole = trained.views(grad_weight[slot])
                close(
                    torch.cat([whole[n].flatten() for n in fields]),
                    torch.cat([wanted[n].flatten() for n in fields]),
                )
        at += count
    if fields:
        replicas_agree(world.slots, [result[3] for result in results])


@settings(max_examples=25, deadline=None)
@given(case=CASES, frozen=st.sampled_from([(), ("w_down",), ("w_gate", "w_up"), SWIGLU]))
def test_a_function_computes_what_the_dense_reference_does(
    case: Case, frozen: tuple[str, ...]
) -> None:
    case = replace(case, activation="swiglu")
    check(case, run_ranks(lambda e: one_rank(e, case, frozen), size=case.ranks), frozen)


@settings(max_examples=12, deadline=None)
@given(case=CASES)
def test_a_function_computes_what_the_hand_written_experts_do(case: Case) -> None:
    case = replace(case, activation="swiglu")
    general = run_ranks(lambda e: one_rank(e, case, ()), size=case.ranks)
    for found, wanted in zip(
        general, run_ranks(lambda e: by_hand(e, case), size=case.ranks), strict=True
    ):
        for ours, theirs in zip(found, wanted, strict=True):
            scale = float(theirs.abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * max(scale, 1e-30))


def one_process(exchange: Exchange, cases: list[Case]) -> list[tuple[np.ndarray, ...]]:
    return [tuple(t.numpy() for t in one_rank(exchange, case, ("w_up",))) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_same_over_real_processes(ranks: int) -> None:
    random = np.random.default_rng(ranks)
    cases = [
        Case(
            ranks=ranks, experts=int(random.choice([2, 5, 8])), top_k=int(random.choice([1, 2])),
            activation="swiglu", mode=str(random.choice(["home", "balanced"])), price=5.0,
            seed=int(random.integers(2**32)), hot=False, recompute=bool(random.integers(2)),
            overwrite=bool(random.integers(2)), hidden=21,
        )
        for _ in range(6)
    ]  # fmt: skip
    by_rank = run_processes(one_process, size=ranks, args=(cases,))
    for i, case in enumerate(cases):
        found = [tuple(torch.from_numpy(a) for a in results[i]) for results in by_rank]
        check(case, found, ("w_up",))  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(recompute: bool) -> None:
    torch.manual_seed(0)
    layout = TensorLayout({"w_gate": (24, 40), "w_up": (24, 40), "w_down": (40, 24)}, dim=24)
    weight = torch.randn(1, layout.row_numel)
    options = PathOptions(layout=layout, run=swiglu, recompute=recompute)
    x = torch.randn(9, 24)
    found = []
    for count in (1, 2, 9):
        rows = x[:count].clone().requires_grad_()
        routed = routed_alone(rows, torch.zeros(count, 1, dtype=torch.int64))
        y = expert_path(rows, torch.ones(count, 1), weight, routed, options)
        y.square().sum().backward()
        assert rows.grad is not None
        found.append((y[0].detach(), rows.grad[0]))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(found[0], one, strict=True))


def routed_alone(x: Tensor, choice: Tensor):  # type: ignore[no-untyped-def]
    exchange = run_ranks(lambda e: e, size=1)[0]
    return route(x, choice, table=RoutingTable.solo(1), exchange=exchange)


def test_recomputing_sees_the_same_random_numbers() -> None:
    layout = TensorLayout({"w": (16, 16)}, dim=16)

    def noisy(rows: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return F.dropout(rows @ fields["w"], 0.5)

    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        weight, x = torch.randn(1, layout.row_numel).requires_grad_(), torch.randn(20, 16)
        options = PathOptions(layout=layout, run=noisy, recompute=recompute)
        routed = routed_alone(x, torch.zeros(20, 1, dtype=torch.int64))
        y = expert_path(x, torch.ones(20, 1, requires_grad=True), weight, routed, options)
        y.square().sum().backward()
        assert weight.grad is not None
        grads.append((weight.grad, torch.rand(3)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_tensors_that_the_function_does_not_use_get_zeros() -> None:
    layout = TensorLayout({"w": (8, 8), "unused": (3,), "scale": ()}, dim=8)
    weight = torch.ones(1, layout.row_numel, requires_grad=True)
    weight.grad = torch.full_like(weight, torch.nan)
    x = torch.randn(4, 8)
    routed = routed_alone(x, torch.zeros(4, 1, dtype=torch.int64))
    options = PathOptions(layout=layout, run=lambda rows, f: rows @ f["w"] * f["scale"])
    written: set[int] = set()
    expert_path(x, torch.ones(4, 1), weight, routed, options, written=written).sum().backward()
    fields = layout.views(weight.grad[0])
    assert written == {0}
    assert not fields["unused"].any()
    torch.testing.assert_close(fields["scale"], (x @ torch.ones(8, 8)).sum())
    assert not weight.grad[0, layout.num_parameters :].any()


def test_what_an_expert_may_not_return_is_refused() -> None:
    layout = TensorLayout({"w": (8, 4)}, dim=8)
    x = torch.randn(4, 8)
    for run, found in ((lambda r, f: r @ f["w"], r"\(16, 4\)"), (lambda r, f: (r,), "tuple")):
        routed = routed_alone(x, torch.zeros(4, 1, dtype=torch.int64))
        options = PathOptions(layout=layout, run=run)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"a row of width 8 for each row: got {found}"):
            expert_path(x, torch.ones(4, 1), torch.ones(1, 32), routed, options)
    with pytest.raises(ValueError, match="no function `run` is given"):
        PathOptions(layout=layout)
    with pytest.raises(ValueError, match="sizes must be >= 1"):
        TensorLayout({"w": (0, 8)}, dim=8)

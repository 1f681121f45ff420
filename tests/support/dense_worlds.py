"""Random worlds of experts on ranks, and the dense layer that they must equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dispatcher import (
    Exchange,
    ExpertLayout,
    PathOptions,
    RoutingTable,
    SplitRule,
    expert_path,
    route,
    sum_replica_gradients,
)
from dispatcher.reference import dense_moe


@dataclass(frozen=True)
class Case:
    """A random world: who holds what, how many tokens each rank has, and how they choose."""

    ranks: int
    experts: int
    top_k: int
    activation: str
    mode: str
    seed: int
    price: float
    hot: bool
    recompute: bool
    overwrite: bool
    hidden: int


CASES = st.builds(
    Case,
    ranks=st.integers(1, 7),
    experts=st.sampled_from([1, 2, 3, 5, 8, 16, 32]),
    top_k=st.sampled_from([1, 2, 8]),
    activation=st.sampled_from(["gelu", "gelu_bias", "swiglu"]),
    mode=st.sampled_from(["home", "shares", "balanced"]),
    seed=st.integers(0, 2**32 - 1),
    price=st.sampled_from([0.0, 5.0]),
    hot=st.booleans(),
    recompute=st.booleans(),
    overwrite=st.booleans(),
    hidden=st.sampled_from([20, 21]),
)
DIM = 12  # rows of 20 hidden units fill their lines, those of 21 end in padding


def slots_of(case: Case, random: np.random.Generator) -> np.ndarray:
    """Any replica counts; a rank may hold nothing."""
    holds = random.random((case.experts, case.ranks)) < random.random()
    if case.ranks > 1:
        holds[:, random.integers(case.ranks)] = False
    for expert in range(case.experts):
        if not holds[expert].any():
            holds[expert, random.integers(case.ranks)] = True
    slots = np.full((case.ranks, case.experts), -1)
    for rank in range(case.ranks):
        held = np.flatnonzero(holds[:, rank])
        slots[rank, : held.size] = held
    return slots


def tokens_of(case: Case, random: np.random.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each rank's tokens, choices and weights; some ranks have none, some copies go nowhere."""
    top_k = min(case.top_k, case.experts)
    parts = []
    for _ in range(case.ranks):
        count = int(random.choice([0, 1, 3, 40]))
        choice = random.random((count, case.experts)).argsort(1)[:, :top_k]
        if case.hot and top_k == 1:
            choice[:] = 0
        choice = np.where(random.random((count, top_k)) < 0.05, -1, choice)
        x = torch.from_numpy(random.standard_normal((count, DIM))).float()
        gate = torch.from_numpy(random.random((count, top_k))).float()
        parts.append((x, torch.from_numpy(np.ascontiguousarray(choice)), gate))
    return parts


@dataclass(frozen=True)
class World:
    """A case made concrete: every rank derives the same one from the case."""

    layout: ExpertLayout
    slots: np.ndarray
    shares: np.ndarray
    rows: Tensor
    parts: list[tuple[Tensor, Tensor, Tensor]]


def world_of(case: Case) -> World:
    random = np.random.default_rng(case.seed)
    slots = slots_of(case, random)
    parts = tokens_of(case, random)
    layout = ExpertLayout(
        activation="swiglu" if case.activation == "swiglu" else "gelu",
        dim=DIM,
        hidden=case.hidden,
        bias=case.activation == "gelu_bias",
    )
    rows = torch.from_numpy(random.standard_normal((case.experts, layout.row_numel))).float() / 4
    shares = random.random((case.experts, case.ranks))
    for rank in range(case.ranks):
        shares[np.setdiff1d(np.arange(case.experts), slots[rank]), rank] = 0
    return World(layout, slots, shares / shares.sum(1, keepdims=True), rows, parts)


def one_rank(exchange: Exchange, case: Case) -> tuple[Tensor, ...]:
    """Two micro-batches, forward and backward, then the replicas' gradients."""
    world = world_of(case)
    table = RoutingTable.from_plan_arrays(world.slots, world.shares, rank=exchange.rank)
    x, choice, gate = (t.clone() for t in world.parts[exchange.rank])
    x.requires_grad_()
    gate.requires_grad_()
    held = [max(e, 0) for e in table.slots_of(exchange.rank)]
    weight = world.rows[held].clone().requires_grad_()
    options = PathOptions(layout=world.layout, recompute=case.recompute)
    rule = SplitRule(mode=case.mode, rows_per_replica=case.price)
    served = np.zeros(table.holds_ER.shape, dtype=np.bool_)
    written: set[int] | None = set() if case.overwrite else None
    if case.overwrite:
        weight.grad = torch.full_like(weight, torch.nan)  # what an abandoned attempt left behind
    out = []
    for _ in range(2):
        routed = route(x, choice, table=table, exchange=exchange, rule=rule, served_ER=served)
        served |= routed.split.served_ER
        y = expert_path(x, gate, weight, routed, options, written=written)
        (y * y).sum().backward()
        out.append(y.detach())
    assert torch.equal(out[0], out[1])  # whichever replica served, the rows are the same bits
    assert weight.grad is not None
    assert x.grad is not None
    assert gate.grad is not None
    sum_replica_gradients(weight.grad, table, exchange, served_ER=served, written=written)
    return out[0], x.grad / 2, gate.grad / 2, weight.grad / 2


def check(case: Case, results: list[tuple[Tensor, ...]]) -> None:
    world = world_of(case)
    expected = reference(world.parts, world.rows, world.layout)
    at = 0
    for rank, (out, grad_x, grad_gate, grad_weight) in enumerate(results):
        count = out.shape[0]
        close(out, expected[0][at : at + count])
        close(grad_x, expected[1][at : at + count])
        close(grad_gate, expected[2][at : at + count])
        for slot, expert in enumerate(world.slots[rank]):
            if expert >= 0:
                close(grad_weight[slot], expected[3][expert])
        at += count
    replicas_agree(world.slots, [result[3] for result in results])


def replicas_agree(slots: np.ndarray, grads: list[Tensor]) -> None:
    for expert in range(int(slots.max()) + 1):
        copies = [grads[rank][slot] for rank, slot in np.argwhere(slots == expert)]
        assert all(torch.equal(copies[0], other) for other in copies[1:])


def reference(
    parts: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, layout: ExpertLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, choice, gate = (torch.cat(column).double() for column in zip(*parts, strict=True))
    leaf = rows.double().requires_grad_()
    x.requires_grad_()
    gate.requires_grad_()
    fields = [layout.views(row) for row in leaf]
    y = dense_moe(x, choice.long(), gate, fields, activation=layout.activation)
    ((y * y).sum() + 0 * (x.sum() + gate.sum() + leaf.sum())).backward()
    zero = torch.zeros(())
    grads = [zero.expand_as(t) if t.grad is None else t.grad for t in (x, gate, leaf)]
    return y.detach(), grads[0], grads[1], grads[2]


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest magnitude, however small that is; zeros are exact."""
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected).abs().max().item()
        assert error <= 1e-5 * expected.abs().max().item()

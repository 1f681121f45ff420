"""Laws that every public function of ``placement`` keeps, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import comb

import numpy as np
import pytest
from greedy_allocation import allocate_by_heap
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import (
    InfeasiblePlacementError,
    PlacementRequest,
    Plan,
    allocate_as_paper,
    allocate_replicas,
    certificate,
    plan,
    replan,
)
from placement.balance.shares import balance_of, dense_shares, node_factors
from placement.exact.program import is_small
from placement.migration.migrate import balanced_choice, transfers
from placement.rebalance import Regret, accumulated
from placement.survival.bitmasks import mask_of, minimal_masks
from placement.survival.resilience import survival
from placement.testing import assert_valid, conformance

LOADS = st.lists(st.floats(0, 1e9) | st.sampled_from([0.0, 1.0, 1e-300]), min_size=1, max_size=12)
FEW = settings(max_examples=40, deadline=None)


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    experts = draw(st.integers(1, 12))
    nodes = draw(st.integers(1, 9))
    least = -(-experts // nodes)
    per_node = draw(st.sampled_from([1, 1, 1, 2, 4]))
    slots = -(-draw(st.integers(least, least + 6)) // per_node) * per_node
    layers = draw(st.integers(1, 3))
    row = st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=experts, max_size=experts)
    return PlacementRequest(
        load=[draw(row) for _ in range(layers)],
        num_nodes=nodes,
        slots_per_node=slots,
        min_replicas=draw(st.integers(1, nodes)),
        ranks_per_node=per_node,
        profile=draw(st.sampled_from(["balanced", "safe"])),
        solver="greedy",
    )


@given(load=LOADS, nodes=st.integers(1, 9), slots=st.integers(1, 6), floor=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_allocation_equals_the_greedy_rule_slot_by_slot(
    load: list[float], nodes: int, slots: int, floor: int
) -> None:
    floor = min(floor, nodes)
    if nodes * slots < len(load) * floor:
        with pytest.raises(InfeasiblePlacementError):
            allocate_replicas(load, num_slots=nodes * slots, min_replicas=floor, max_replicas=nodes)
        return
    fast = allocate_replicas(load, num_slots=nodes * slots, min_replicas=floor, max_replicas=nodes)[
        0
    ]
    slow = allocate_by_heap(load, num_slots=nodes * slots, min_replicas=floor, max_replicas=nodes)
    assert tuple(fast) == slow
    assert sum(slow) == min(nodes * slots, len(load) * nodes)
    assert min(slow) >= floor and max(slow) <= nodes


@pytest.mark.parametrize("kind", ["even", "few values", "skewed", "idle"])
def test_large_problems_are_allocated_by_the_same_rule(kind: str) -> None:
    """Beyond some thousand grants a threshold is bisected instead."""
    rng = np.random.default_rng(5)
    shape, nodes = (4, 256), 64
    loads = {
        "even": np.ones(shape),
        "few values": rng.integers(1, 4, shape).astype(float),
        "skewed": rng.permuted(1.0 / np.arange(1, 257) ** 1.2 * np.ones(shape), axis=1),
        "idle": rng.integers(0, 2, shape) * rng.random(shape),
    }[kind]
    for slots, floor in ((nodes * 8, 1), (nodes * 9, 2), (nodes * 300, 1)):
        limits = {"num_slots": slots, "min_replicas": floor, "max_replicas": nodes}
        found = allocate_replicas(loads, **limits)
        assert len(found) == len(loads)
        for load, counts in zip(loads[:2], found, strict=False):
            assert tuple(counts) == allocate_by_heap(load.tolist(), **limits)


@given(load=LOADS, floor=st.integers(1, 3), spare=st.integers(0, 40))
def test_the_papers_rule_uses_every_slot_and_keeps_the_floor(
    load: list[float], floor: int, spare: int
) -> None:
    slots = len(load) * floor + spare
    counts = allocate_as_paper(load, num_slots=slots, min_replicas=floor)
    assert sum(counts) == slots and min(counts) >= floor
    in_order = [counts[e] for e in sorted(range(len(load)), key=lambda e: (load[e], e))]
    assert in_order == sorted(in_order)


@given(request=requests())
@settings(max_examples=40, deadline=None)
def test_a_plan_keeps_every_promise_of_its_type(request: PlacementRequest) -> None:
    made = plan(request)
    assert_valid(made, request)
    assert plan(request).digest == made.digest
    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_dict(made.to_dict()).digest == made.digest


@given(request=requests(), change=st.data())
@settings(max_examples=50, deadline=None)
def test_after_any_loss_and_join_the_plan_is_valid_and_stays_in_place(
    request: PlacementRequest, change: st.DataObject
) -> None:
    before = plan(request)
    lost = change.draw(st.frozensets(st.sampled_from(request.node_ids)))
    joined = change.draw(st.integers(0, 2))
    members = [n for n in request.node_ids if n not in lost]
    members += [request.num_nodes + i for i in range(joined)]
    if not members:
        return
    after = PlacementRequest(
        load=request.load,
        num_nodes=len(members),
        slots_per_node=request.slots_per_node,
        min_replicas=request.min_replicas,
        ranks_per_node=request.ranks_per_node,
        node_ids=tuple(members),
    )
    if len(members) * request.slots_per_node < request.num_experts:
        with pytest.raises(InfeasiblePlacementError, match=str(len(members))):
            replan(after, previous=before, lost=lost)
        return
    made = replan(after, previous=before, lost=lost)
    assert_valid(made, after)
    assert replan(after, previous=before, lost=lost) == made
    if not lost and not joined:
        assert made is before
    for transfer in transfers(before, made, lost=lost):
        assert transfer.source_node not in lost


@given(request=requests(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_program_in_auto_is_valid_repeatable_and_never_survives_less(
    request: PlacementRequest, seed: int
) -> None:
    auto = replace(request, solver="auto")
    assert not is_small(request)
    if not is_small(auto):
        assert plan(auto) == plan(request)
        return
    made, greedy = plan(auto), plan(request)
    assert_valid(made, auto)
    assert plan(auto) == made and ("ilp" in made.method or "ilp" in made.notes[-1])
    ours, theirs = certificate(made, load=auto.load), certificate(greedy, load=auto.load)
    nodes = auto.num_nodes
    assert sum(ours.survival[k] * 0.5**k for k in range(nodes)) >= (
        sum(theirs.survival[k] * 0.5**k for k in range(nodes)) - 1e-9
    )
    assert replan(auto, previous=None) == greedy  # a policy's plans keep their template


@given(request=requests())
@FEW
def test_the_certificate_agrees_with_enumeration(request: PlacementRequest) -> None:
    made = plan(request)
    found = certificate(made, load=request.load)
    sets = {mask_of(np.flatnonzero(row)) for row in made.node_member.reshape(-1, made.num_nodes)}
    for k, probability in found.survival.items():
        dead = [d for d in range(1 << made.num_nodes) if d.bit_count() == k]
        alive = sum(all(s & ~d for s in sets) for d in dead)
        assert abs(alive / comb(made.num_nodes, k) - probability) < 1e-12
    weakest = mask_of(made.node_ids.index(n) for n in found.fatal_nodes)
    assert any(s & ~weakest == 0 for s in sets)
    assert found.min_distinct_nodes == len(found.fatal_nodes)
    assert found.fatal_experts


@given(sets=st.lists(st.integers(1, 511), min_size=1, max_size=8), more=st.integers(1, 511))
@FEW
def test_survival_falls_with_losses_and_with_every_further_set(sets: list[int], more: int) -> None:
    one = survival(sets, num_nodes=9).probability
    two = survival([*sets, more], num_nodes=9).probability
    assert all(a >= b for a, b in pairwise(one))
    assert all(a >= b - 1e-15 for a, b in zip(one, two, strict=True))
    assert one[0] == 1.0 and one[-1] == 0.0
    assert survival(minimal_masks(sets), num_nodes=9).probability == one


@given(request=requests())
@FEW
def test_shares_never_do_worse_than_equal_shares(request: PlacementRequest) -> None:
    member = plan(request).node_member
    shares = dense_shares(member, node_factors(request.load, member))
    assert np.abs(shares.sum(2) - 1).max() < 1e-9
    equal = np.ones((request.num_layers, request.num_nodes))
    even = (dense_shares(member, equal) * request.load[:, :, None]).sum(1).max(1)
    ours = (shares * request.load[:, :, None]).sum(1).max(1)
    assert (ours <= even * (1 + 1e-9) + 1e-290).all()
    assert (balance_of(request.load, member) >= 1 - 1e-9).all()


@given(rows=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=12))
def test_senders_are_owners_and_their_busiest_is_as_idle_as_can_be(rows: list[list[int]]) -> None:
    chosen = balanced_choice(rows)
    assert all((c in r) if r else c == -1 for c, r in zip(chosen, rows, strict=True))
    counts = [chosen.count(o) for o in range(6)]
    # Hall: any set of options must carry the rows that can go nowhere else.
    least = 0
    for options in range(1, 64):
        inside = sum(bool(r) and all(options >> o & 1 for o in r) for r in rows)
        least = max(least, -(-inside // options.bit_count()))
    assert max(counts, default=0) == least


@given(gains=st.lists(st.floats(-1, 1), max_size=30), cost=st.floats(0, 5), alpha=st.floats(0, 2))
def test_regret_grows_only_with_gains_and_is_paid_off_by_moving(
    gains: list[float], cost: float, alpha: float
) -> None:
    regret = Regret()
    for gain in gains:
        before = regret.value
        regret, due = accumulated(regret, gain=gain, steps=1, cost=cost, alpha=alpha)
        assert regret.value == (0.0 if due else before + max(gain, 0.0))
        assert due == (gain > 0 and before + gain > alpha * cost)


@given(request=requests())
@FEW
def test_factors_are_the_same_in_small_and_large_form(request: PlacementRequest) -> None:
    from placement.balance import shares as balance

    member = plan(request).node_member
    small = dense_shares(member, node_factors(request.load, member))
    limit = balance._DENSE
    try:
        balance._DENSE = 0
        large = dense_shares(member, node_factors(request.load, member))
    finally:
        balance._DENSE = limit
    worst = (small * request.load[:, :, None]).sum(1).max(1)
    other = (large * request.load[:, :, None]).sum(1).max(1)
    assert np.allclose(worst, other, rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_our_own_policy_conforms(seed: int) -> None:
    assert conformance(replan, seed=seed) > 50


def test_conformance_catches_a_policy_that_forgets_the_floor() -> None:
    def careless(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
        one = PlacementRequest(
            load=request.load,
            num_nodes=request.num_nodes,
            slots_per_node=-(-request.num_experts // request.num_nodes),
            min_replicas=1,
            node_ids=request.node_ids,
        )
        return replan(one, previous=None)

    with pytest.raises(AssertionError, match="nodes"):
        conformance(careless)

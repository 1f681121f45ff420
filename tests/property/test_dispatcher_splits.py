"""Splits conserve every copy, stay on replicas, agree on every rank, and balance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from dispatcher.reference import split_cost
from dispatcher.splits.balance import balanced_quotas, levelled_quotas, pace
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import MODES, SplitRule, flows, rounded_shares, split_counts

TRACE = Path(__file__).parents[3] / "shared/data/expert-load/smartmoe-expert-load.npz"


def random_table(random: np.random.Generator, *, ranks: int, experts: int) -> RoutingTable:
    holds = random.random((experts, ranks)) < random.uniform(0.1, 0.9)
    for expert in range(experts):
        holds[expert, random.integers(ranks)] = True
    slots = np.full((ranks, experts), -1)
    for rank in range(ranks):
        held = np.flatnonzero(holds[:, rank])
        slots[rank, : held.size] = held
    shares = np.where(holds, random.random(holds.shape) + 1e-3, 0.0)
    return RoutingTable.from_plan_arrays(slots, shares / shares.sum(1, keepdims=True), rank=0)


def random_counts(random: np.random.Generator, *, ranks: int, experts: int) -> np.ndarray:
    popularity = random.dirichlet(np.full(experts, random.choice([0.1, 1.0, 10.0])))
    tokens = random.integers(0, 400, size=ranks)
    return np.stack([random.multinomial(n, popularity) for n in tokens])


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.integers(1, 7),
    experts=st.integers(1, 32),
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(MODES),
    price=st.sampled_from([0.0, 3.0, 60.0]),
)
def test_every_copy_arrives_once_at_a_rank_that_has_the_expert(
    ranks: int, experts: int, seed: int, mode: str, price: float
) -> None:
    random = np.random.default_rng(seed)
    base = random_table(random, ranks=ranks, experts=experts)
    counts = random_counts(random, ranks=ranks, experts=experts)
    splits = [
        split_counts(
            counts,
            RoutingTable.from_plan_arrays(base.expert_of_slot_RS, base.shares_ER, rank=rank),
            SplitRule(mode=mode, rows_per_replica=price),
        )
        for rank in range(ranks)
    ]
    for rank, split in enumerate(splits):
        assert (split.send_JE >= 0).all()
        assert (split.send_JE.sum(0) == counts[rank]).all()
        assert (split.rows_ER == splits[0].rows_ER).all()
        assert (split.recv_IE.sum(0) == split.rows_ER[:, rank]).all()
        assert not split.rows_ER[~base.holds_ER].any()
        for peer, other in enumerate(splits):
            assert (split.send_JE[peer] == other.recv_IE[rank]).all()


@settings(max_examples=150, deadline=None)
@given(ranks=st.integers(1, 7), experts=st.integers(1, 16), seed=st.integers(0, 2**32 - 1))
def test_shares_give_the_papers_loads_up_to_rounding_and_local_copies_stay(
    ranks: int, experts: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    table = random_table(random, ranks=ranks, experts=experts)
    counts = random_counts(random, ranks=ranks, experts=experts)
    quota = rounded_shares(counts.sum(0), table.shares_ER)
    exact = paper_flows(counts, table.shares_ER)
    assert np.abs(quota - exact.sum(0)).max() < 1
    flow = flows(counts, quota)
    kept = np.stack([flow[rank, :, rank] for rank in range(ranks)])
    assert (kept == np.minimum(counts, quota.T)).all()
    assert np.abs(flow - exact).max() < ranks + 1


def paper_flows(counts_IE: np.ndarray, shares_EJ: np.ndarray) -> np.ndarray:
    """Algorithm 1 in real numbers, line by line, with the denominator that conserves copies."""
    num_ranks, num_experts = counts_IE.shape
    flow = np.zeros((num_ranks, num_experts, num_ranks))
    for e in range(num_experts):
        capacity = counts_IE[:, e].sum() * shares_EJ[e]
        residual = capacity - np.minimum(capacity, counts_IE[:, e])
        for i in range(num_ranks):
            kept = capacity[i] - residual[i]
            flow[i, e, i] += kept
            if counts_IE[i, e] > kept and residual.sum() > 0:
                flow[i, e] += (counts_IE[i, e] - kept) * residual / residual.sum()
    return flow


def best_busiest(total_E: np.ndarray, holds_ER: np.ndarray) -> float:
    """The linear program: the least possible rows of the busiest rank."""
    pairs = np.argwhere(holds_ER)
    size = len(pairs) + 1
    equal = np.zeros((holds_ER.shape[0], size))
    below = np.zeros((holds_ER.shape[1], size))
    equal[pairs[:, 0], np.arange(size - 1)] = 1
    below[pairs[:, 1], np.arange(size - 1)] = 1
    below[:, -1] = -1
    goal = np.zeros(size)
    goal[-1] = 1
    result = linprog(goal, A_ub=below, b_ub=np.zeros(len(below)), A_eq=equal, b_eq=total_E)
    return float(result.fun)


def trace_loads(count: int) -> list[np.ndarray]:
    load = np.load(TRACE)["load"]
    random = np.random.default_rng(5)
    return [
        load[random.integers(load.shape[0]), random.integers(load.shape[1])] // 16
        for _ in range(count)
    ]


def test_balanced_is_within_five_percent_of_the_linear_program() -> None:
    random = np.random.default_rng(11)
    sizes = [8, 16, 32, 4, 64] * 70
    check_balance([random_counts(random, ranks=8, experts=e).sum(0) for e in sizes])


@pytest.mark.skipif(not TRACE.exists(), reason=f"no routing trace at {TRACE}")
def test_balanced_is_within_five_percent_on_a_real_trace() -> None:
    check_balance(trace_loads(150))


def check_balance(loads: list[np.ndarray]) -> None:
    random = np.random.default_rng(12)
    for total in loads:
        ranks = int(random.integers(2, 17))
        table = random_table(random, ranks=ranks, experts=total.size)
        quota = balanced_quotas(np.asarray(total, dtype=np.int64), table)
        assert (quota.sum(1) == total).all()
        best = best_busiest(total, table.holds_ER)
        assert quota.sum(0).max() <= 1.05 * best + total.size


@settings(max_examples=100, deadline=None)
@given(ranks=st.integers(2, 7), experts=st.integers(1, 16), seed=st.integers(0, 2**32 - 1))
def test_by_its_own_cost_balanced_is_no_worse_than_home_or_free_spreading(
    ranks: int, experts: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    table = random_table(random, ranks=ranks, experts=experts)
    total = random_counts(random, ranks=ranks, experts=experts).sum(0)
    home = np.zeros_like(table.holds_ER, dtype=np.int64)
    home[np.arange(experts), table.home_E] = total
    for price in (5.0, 40.0, 1e6):
        quota = balanced_quotas(total, table, rows_per_replica=price)
        assert (quota.sum(1) == total).all()
        cost = split_cost(quota, table, rows_per_replica=price)
        assert cost <= split_cost(home, table, rows_per_replica=price)
        free = balanced_quotas(total, table)
        assert cost <= split_cost(free, table, rows_per_replica=price)
        assert quota.sum(0).max() >= free.sum(0).max() * 0.98 - 1


def chosen_slowly(
    total: np.ndarray, table: RoutingTable, served: np.ndarray, **prices: float
) -> np.ndarray:
    """Balanced quotas by their definition: every number of hottest experts, counted densely."""
    home = served.copy()
    home[np.arange(total.size), table.home_E] = True
    hottest = np.argsort(-total, kind="stable")
    busy = int((total > 0).sum())
    tried = []
    for count in sorted({0, *[n for n in (1, 2, 4, 8, 16) if n < busy], busy}):
        opened = home.copy()
        opened[hottest[:count]] = table.holds_ER[hottest[:count]]
        quota = levelled_quotas(total, table, open_ER=opened)
        tried.append((split_cost(quota, table, served_ER=served, **prices), len(tried), quota))
    return min(tried, key=lambda t: t[:2])[2]


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(2, 7), experts=st.integers(1, 16), sharing=st.sampled_from([1.0, 1.5, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_balanced_quotas_are_those_of_their_definition(
    ranks: int, experts: int, sharing: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    table = random_table(random, ranks=ranks, experts=experts)
    total = random_counts(random, ranks=ranks, experts=experts).sum(0)
    served = table.holds_ER & (random.random(table.holds_ER.shape) < 0.3)
    for price in (5.0, 41.0, 1e6):
        prices = {"rows_per_replica": price, "ranks_per_device": sharing}
        quick = balanced_quotas(total, table, served_ER=served, **prices)
        slow = chosen_slowly(total, table, served, **prices)
        assert split_cost(quick, table, served_ER=served, **prices) == pytest.approx(
            split_cost(slow, table, served_ER=served, **prices), rel=1e-12
        )
        assert (quick.sum(1) == total).all()


@settings(max_examples=100, deadline=None)
@given(
    work=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    sharing=st.sampled_from([1.0, 1.5, 2.0, 3.0, 12.0]),
)
def test_the_pace_of_shared_devices_is_that_of_a_clock_run_step_by_step(
    work: list[int], sharing: float
) -> None:
    devices = len(work) / max(1.0, min(sharing, len(work)))
    left, clock = [float(w) for w in work], 0.0
    while active := [w for w in left if w > 1e-9]:
        speed = min(1.0, devices / len(active))
        until_next = min(active) / speed
        clock += until_next
        left = [max(0.0, w - until_next * speed) if w > 1e-9 else 0.0 for w in left]
    assert pace(work, min(sharing, len(work))) == pytest.approx(clock)


def test_where_ranks_share_cores_idle_replicas_are_not_free() -> None:
    # On one core, half of the rows on each rank take as long as all of them on one.
    table = RoutingTable.from_plan_arrays([[0], [0]], rank=0)
    total = np.array([100])
    alone = balanced_quotas(total, table, rows_per_replica=10)
    shared = balanced_quotas(total, table, rows_per_replica=10, ranks_per_device=2)
    assert alone.tolist() == [[50, 50]]
    assert shared.tolist() == [[100, 0]]


def test_a_replica_that_served_before_costs_nothing_more() -> None:
    table = RoutingTable.from_plan_arrays([[0], [0]], rank=0)
    total = np.array([100])
    two = RoutingTable.from_plan_arrays([[0, 1], [0, 1]], rank=0)
    uneven = np.array([100, 60])
    assert balanced_quotas(uneven, two, rows_per_replica=70).tolist() == [[100, 0], [0, 60]]
    served = np.array([[True, True], [False, True]])
    quota = balanced_quotas(uneven, two, rows_per_replica=70, served_ER=served)
    assert quota.tolist() == [[80, 20], [0, 60]]
    # Alone, its two servers exchange slices: each sends as much as its one home did.
    assert balanced_quotas(total, table, rows_per_replica=70).tolist() == [[50, 50]]


def test_shares_a_little_short_of_one_send_no_copy_where_the_expert_is_not() -> None:
    short = [[1 - 9e-7, 0, 0], [0.25, 0.75 - 9e-7, 0], [0, 0, 1 + 9e-7]]
    table = RoutingTable.from_plan_arrays([[0, 1], [1, -1], [2, -1]], short, rank=0)
    counts = np.array([[2_000_000] * 3, [0] * 3, [0] * 3])
    split = split_counts(counts, table, SplitRule(mode="shares"))
    assert not split.rows_ER[~table.holds_ER].any()
    assert (split.rows_ER.sum(1) == 2_000_000).all()
    assert (split.rows_ER >= 0).all()
    assert split.rows_ER[0, 0] == 2_000_000


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="unknown split mode 'fast'; known: home, shares"):
        SplitRule(mode="fast")
    with pytest.raises(ValueError, match="ranks_per_device=0.5 must be >= 1"):
        SplitRule(ranks_per_device=0.5)

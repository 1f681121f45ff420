"""The five methods agree with enumeration, and the estimate with its own interval."""

from __future__ import annotations

import random
from math import comb

import numpy as np
import pytest

from placement import InvalidRequestError
from placement.survival.bitmasks import components, mask_of, minimal_masks, minimal_sets, nodes_of
from placement.survival.estimate import estimated_survival
from placement.survival.frontier import frontier_counts
from placement.survival.resilience import METHODS, domain_masks, survival, survival_under_hazards


def enumerated(sets: list[int], nodes: int) -> list[float]:
    alive = [0] * (nodes + 1)
    for dead in range(1 << nodes):
        alive[dead.bit_count()] += not any(dead & s == s for s in sets)
    return [a / comb(nodes, k) for k, a in enumerate(alive)]


def random_sets(rng: random.Random, nodes: int) -> list[int]:
    """Node sets of several layers: arbitrary ones, segments, intervals or wrapped intervals."""
    kind = rng.choice(["any", "segments", "line", "ring"])
    sets = []
    if kind == "segments":
        start = 0
        while start < nodes:
            size = min(rng.randint(1, 3), nodes - start)
            sets += [mask_of(range(start, start + size))] * rng.randint(1, 2)
            start += size
        return sets
    for _ in range(rng.randint(1, 9)):
        start, size = rng.randrange(nodes), rng.randint(1, nodes)
        if kind == "any":
            sets.append(rng.randint(1, 2**nodes - 1))
        elif kind == "line":
            sets.append(mask_of(range(start, min(start + size, nodes))))
        else:
            sets.append(mask_of((start + i) % nodes for i in range(size)))
    return sets


def test_all_methods_agree_with_enumeration_on_random_plans() -> None:
    rng = random.Random(4)
    used: dict[str, int] = dict.fromkeys(METHODS, 0)
    for _ in range(2000):
        nodes = rng.randint(1, 8)
        sets = random_sets(rng, nodes)
        truth = enumerated(sets, nodes)
        for method in ("auto", "closed form", "truth table", "interval", "frontier"):
            try:
                found = survival(sets, num_nodes=nodes, method=method)
            except InvalidRequestError:
                continue
            assert found.exact and found.low == found.high == found.probability
            assert max(abs(a - b) for a, b in zip(found.probability, truth, strict=True)) < 1e-12
            used[method if method != "auto" else found.method] += 1
    assert all(used[m] > 100 for m in METHODS if m != "estimate")


def test_intervals_of_a_large_ring_agree_with_the_frontier() -> None:
    sets = [mask_of((4 * i + j) % 36 for j in range(6)) for i in range(9)]
    ring = survival(sets, num_nodes=36, method="interval").probability
    counts = frontier_counts(sets, num_nodes=36)
    assert counts is not None
    exact = [c / comb(36, k) for k, c in enumerate(counts)]
    assert max(abs(a - b) for a, b in zip(ring, exact, strict=True)) < 1e-12


def test_a_thousand_nodes_of_segments_are_exact() -> None:
    sets = [mask_of(range(32 * i, 32 * i + 32)) for i in range(32)]
    found = survival(sets, num_nodes=1024, max_losses=40)
    assert found.method == "closed form"
    # Inclusion-exclusion; two whole segments need 64 losses, so single ones are all there is.
    for k in (32, 35, 40):
        truth = 32 * comb(1024 - 32, k - 32) / comb(1024, k)
        assert 1 - found.probability[k] == pytest.approx(truth, abs=1e-15)


@pytest.mark.parametrize("seed", range(8))
def test_the_estimate_holds_its_four_sigma_interval(seed: int) -> None:
    rng = random.Random(seed)
    nodes = 12
    sets = list(minimal_masks(random_sets(rng, nodes) + [rng.randint(1, 4095) for _ in range(6)]))
    truth = enumerated(sets, nodes)
    for k in range(nodes + 1):
        value, low, high = estimated_survival(sets, num_nodes=nodes, losses=k, seed=seed)
        assert low - 1e-12 <= truth[k] <= high + 1e-12, (k, value, truth[k])
        assert 0.0 <= low <= value <= high <= 1.0


def test_the_estimate_resolves_a_failure_of_one_in_a_million() -> None:
    sets = [mask_of(range(5 * i, 5 * i + 7)) for i in range(20)]
    exact = survival(sets, num_nodes=107, max_losses=9).probability[9]
    value, low, high = estimated_survival(sets, num_nodes=107, losses=9, seed=1)
    assert 0 < 1 - exact < 1e-4
    assert abs((1 - value) / (1 - exact) - 1) < 0.1
    assert low - 1e-12 <= exact <= high + 1e-12


def test_an_entangled_large_plan_is_estimated_and_says_so() -> None:
    rng = random.Random(0)
    sets = [mask_of(rng.sample(range(200), 5)) for _ in range(300)]
    found = survival(sets, num_nodes=200, max_losses=3)
    assert found.method == "estimate" and not found.exact
    bounded = survival([s | 1 for s in sets], num_nodes=200, max_losses=3, bound=[1])
    assert bounded.method in ("template bound", "estimate", "closed form", "frontier")


def test_a_lower_bound_is_named_as_one() -> None:
    rng = random.Random(1)
    core = [mask_of(range(10 * i, 10 * i + 10)) for i in range(20)]
    sets = [c | mask_of(rng.sample(range(200), 8)) for c in core for _ in range(20)]
    found = survival(sets, num_nodes=200, max_losses=12, bound=core)
    assert found.method == "template bound" and not found.exact
    assert found.low == found.probability and set(found.high) == {1.0}
    sampled = survival(sets, num_nodes=200, max_losses=12, method="estimate")
    assert all(a <= b + 1e-12 for a, b in zip(found.probability, sampled.high, strict=True))


def test_unequal_hazards_agree_with_enumeration() -> None:
    rng = random.Random(2)
    for _ in range(100):
        nodes = rng.randint(1, 8)
        sets = random_sets(rng, nodes)
        hazards = [rng.random() for _ in range(nodes)]
        truth = 0.0
        for dead in range(1 << nodes):
            if not any(dead & s == s for s in sets):
                chance = 1.0
                for n, h in enumerate(hazards):
                    chance *= h if dead >> n & 1 else 1 - h
                truth += chance
        assert survival_under_hazards(sets, hazards=hazards) == pytest.approx(truth, abs=1e-12)


def test_racks_are_nodes_of_a_coarser_cluster() -> None:
    sets = [mask_of([0, 1]), mask_of([2, 5]), mask_of([3, 4, 5])]
    of_rack = domain_masks(sets, [0, 0, 1, 1, 2, 2])
    assert of_rack == (mask_of([0]), mask_of([1, 2]))
    assert survival(of_rack, num_nodes=3).probability == pytest.approx((1.0, 2 / 3, 0.0, 0.0))


def test_minimal_sets_are_the_same_for_few_and_for_many_nodes() -> None:
    rng = np.random.default_rng(0)
    for nodes in (5, 64, 65, 200):
        member = rng.random((2, 6, nodes)) < 0.3
        member[:, :, 0] |= ~member.any(2)
        masks = [mask_of(np.flatnonzero(row)) for row in member.reshape(-1, nodes)]
        assert minimal_sets(member) == minimal_masks(masks)


def test_components_share_no_node_and_lose_no_set() -> None:
    sets = [0b0011, 0b0110, 0b11000, 0b100000]
    assert components(sets) == ((0b0011, 0b0110), (0b11000,), (0b100000,))
    assert nodes_of(mask_of([9, 2, 4])) == (2, 4, 9)


@pytest.mark.parametrize(
    ("sets", "nodes", "method", "message"),
    [([0], 3, "auto", "empty"), ([8], 3, "auto", "beyond the 3"), ([1], 3, "magic", "'magic'"),
     ([0b101, 0b011], 3, "closed form", "cannot do these 2 sets")],
)  # fmt: skip
def test_nonsense_is_refused_with_the_numbers(
    sets: list[int], nodes: int, method: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        survival(sets, num_nodes=nodes, method=method)

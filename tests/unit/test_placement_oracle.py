"""The family against the exhaustive optimum, and the golden values and counter-examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement
from math import comb

import pytest
from placement_oracle import best_counts, best_counts_of_all
from placement_search import best_of_family, searched

from placement.survival.bitmasks import minimal_masks
from placement.survival.resilience import survival
from placement.survival.truth import surviving_counts
from placement.templates.family import complementary_tail, family, mro
from placement.templates.template import masks

Vector = tuple[int, ...]


def vectors(nodes: int, slots: int, experts: int) -> Iterator[Vector]:
    """Every ascending replica vector that fits."""
    for counts in combinations_with_replacement(range(1, nodes + 1), experts):
        if sum(counts) <= nodes * slots:
            yield counts


def clipped(counts: Vector, nodes: int, slots: int) -> bool:
    return len(counts) > slots and sum(counts[::slots]) > nodes


def family_counts(counts: Vector, nodes: int, slots: int) -> Vector:
    best = best_of_family(counts, num_nodes=nodes, slots_per_node=slots)[0]
    return surviving_counts(masks(best.blocks), num_nodes=nodes)


def optimal(counts: Vector, nodes: int, slots: int, ours: Vector) -> bool:
    return best_counts(counts, num_nodes=nodes, slots_per_node=slots, known=ours) == ours


def missed(
    shapes: list[tuple[int, int, int]], *, only_clipped: bool = False
) -> tuple[int, list[tuple[int, int, Vector]]]:
    """How many vectors were tried, and those where the family is beaten at some k."""
    tried, beaten = 0, []
    for nodes, slots, experts in shapes:
        these = [
            v for v in vectors(nodes, slots, experts)
            if not only_clipped or clipped(v, nodes, slots)
        ]  # fmt: skip
        if not these:
            continue
        ours = [family_counts(v, nodes, slots) for v in these]
        best = best_counts_of_all(these, num_nodes=nodes, slots_per_node=slots, known=ours)
        tried += len(these)
        beaten += [(nodes, slots, v) for v, a, b in zip(these, ours, best, strict=True) if a != b]
    return tried, beaten


def test_the_reduced_oracle_equals_a_search_over_all_plans_of_tiny_clusters() -> None:
    """Columns as arbitrary sets of experts, no reduction, no symmetry but the nodes' order."""
    for nodes, slots, experts in ((3, 2, 3), (4, 2, 3), (3, 1, 2), (4, 2, 4), (3, 3, 4), (4, 1, 3)):
        columns = [
            sum(1 << e for e in c)
            for size in range(slots + 1)
            for c in combinations(range(experts), size)
        ]
        best: dict[Vector, list[int]] = {}
        for plan in combinations_with_replacement(columns, nodes):
            held = tuple(sum(c >> e & 1 for c in plan) for e in range(experts))
            if list(held) != sorted(held) or min(held) < 1:
                continue
            sets = [sum(1 << n for n, c in enumerate(plan) if c >> e & 1) for e in range(experts)]
            counts = surviving_counts(sets, num_nodes=nodes)
            old = best.setdefault(held, [0] * (nodes + 1))
            best[held] = [max(a, b) for a, b in zip(old, counts, strict=True)]
        for vector in vectors(nodes, slots, experts):
            brute = [0] * (nodes + 1)
            for held, counts in best.items():
                if all(a <= b for a, b in zip(held, vector, strict=True)):
                    brute = [max(a, b) for a, b in zip(brute, counts, strict=True)]
            found = best_counts(vector, num_nodes=nodes, slots_per_node=slots)
            assert tuple(brute) == found, (nodes, slots, vector)


def test_one_walk_over_many_vectors_answers_each_as_if_alone() -> None:
    for nodes, slots, experts in ((4, 3, 4), (5, 2, 5), (6, 2, 4), (5, 3, 6)):
        these = list(vectors(nodes, slots, experts))
        together = best_counts_of_all(these, num_nodes=nodes, slots_per_node=slots)
        for vector, found in zip(these, together, strict=True):
            assert found == best_counts(vector, num_nodes=nodes, slots_per_node=slots)
            ours = family_counts(vector, nodes, slots)
            known = best_counts(vector, num_nodes=nodes, slots_per_node=slots, known=ours)
            assert found == known


@pytest.mark.parametrize(
    ("sizes", "count"), [(range(1, 7), 1340), pytest.param((7,), 1260, marks=pytest.mark.slow)]
)
def test_the_family_is_optimal_at_every_k_up_to_seven_nodes(
    sizes: Sequence[int], count: int
) -> None:
    shapes = [(n, c, e) for n in sizes for c in range(1, 4) for e in range(1, 7)]
    tried, beaten = missed([s for s in shapes if s[0] * s[1] >= s[2]])
    assert tried == count and not beaten


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_family_is_nearly_always_optimal_on_harder_clipped_vectors() -> None:
    shapes = [(n, c, e) for n in range(6, 10) for c in (2, 3, 4) for e in range(4, 8)]
    tried, beaten = missed(shapes, only_clipped=True)
    assert tried == 6019
    assert len(beaten) <= 0.02 * tried, beaten
    left = []
    for nodes, slots, counts in beaten:
        sets, _ = searched(counts, num_nodes=nodes, slots_per_node=slots, starts=4, evaluations=500)
        ours = surviving_counts(minimal_masks(sets), num_nodes=nodes)
        if not optimal(counts, nodes, slots, ours):
            left.append((nodes, slots, counts))
    assert len(left) <= 0.001 * tried, left
    print(f"{tried} clipped vectors, {len(beaten)} missed without search, {len(left)} with")


def test_unclipped_overlap_is_optimal_and_clipped_overlap_may_not_be() -> None:
    for nodes, slots, experts in ((4, 2, 4), (5, 2, 4), (6, 3, 6), (5, 3, 5)):
        for counts in vectors(nodes, slots, experts):
            plan = mro(counts, num_nodes=nodes, slots_per_node=slots)
            ours = surviving_counts(masks(plan), num_nodes=nodes)
            if not clipped(counts, nodes, slots):
                assert optimal(counts, nodes, slots, ours), (nodes, slots, counts)


# nodes, slots, replicas, dead nodes k, survivors of MRO and of the optimum, of C(N, k)
COUNTER_EXAMPLES = [
    (3, 2, (2, 2, 2), 1, 2, 3),
    (4, 2, (2, 3, 3), 2, 4, 5),
    (4, 3, (3, 3, 3, 3), 2, 3, 6),
    (4, 3, (3, 3, 3, 3), 1, 3, 4),
    (5, 2, (2, 2, 2, 2, 2), 1, 4, 5),
    (5, 2, (2, 2, 2, 2, 2), 2, 4, 6),
    (5, 4, (4, 4, 4, 4, 4), 3, 4, 10),
    (6, 2, (4, 4, 4), 4, 8, 12),
]


@pytest.mark.parametrize(("nodes", "slots", "counts", "k", "printed", "best"), COUNTER_EXAMPLES)
def test_the_papers_theorem_fails_where_it_is_known_to(
    nodes: int, slots: int, counts: Vector, k: int, printed: int, best: int
) -> None:
    plan = mro(counts, num_nodes=nodes, slots_per_node=slots)
    if nodes != 6:
        assert surviving_counts(masks(plan), num_nodes=nodes)[k] == printed
    assert family_counts(counts, nodes, slots)[k] == best
    assert best_counts(counts, num_nodes=nodes, slots_per_node=slots)[k] == best


def test_the_fallback_breaks_no_floor_where_overlap_does() -> None:
    assert family_counts((2, 2, 2), 3, 2)[1] == 3
    best = best_of_family((2, 2, 2), num_nodes=3, slots_per_node=2)[0]
    assert {nodes for nodes, _ in best.blocks} == {(0, 1), (0, 2), (1, 2)}


GOLDEN = [
    ((7,) * 4 + (8,) * 4, [1, 1, 1, 1, 1, 1, 0.983, 0.822], 7.806),
    ((3,) * 4 + (4,) * 12, [1, 1, 0.992, 0.948, 0.833, 0.619, 0.3], None),
]


@pytest.mark.parametrize(("counts", "from_one", "summed"), GOLDEN)
def test_golden_values_of_the_papers_settings(
    counts: Vector, from_one: list[float], summed: float | None
) -> None:
    best = best_of_family(counts, num_nodes=10, slots_per_node=6)[0]
    found = survival(masks(best.blocks), num_nodes=10).probability[1:]
    assert [round(p, 3) for p in found[: len(from_one)]] == from_one
    if summed is not None:
        assert sum(found) == pytest.approx(summed, abs=1e-3)


def test_golden_values_of_overlap_and_wrap() -> None:
    counts = (7,) * 4 + (8,) * 4
    plan = mro(counts, num_nodes=10, slots_per_node=6)
    assert [len(nodes) for nodes, _ in plan] == [7, 3]
    found = survival(masks(plan), num_nodes=10).probability
    assert [round(p, 3) for p in found[3:9]] == [0.992, 0.967, 0.917, 0.833, 0.7, 0.467]
    three = mro((3,) * 4 + (4,) * 12, num_nodes=10, slots_per_node=6)
    assert [len(nodes) for nodes, _ in three] == [3, 4, 3]
    found = survival(masks(three), num_nodes=10).probability
    assert [round(p, 3) for p in found[3:8]] == [0.983, 0.929, 0.81, 0.6, 0.3]


def test_one_more_expert_than_slots_is_solved_by_leaving_one_out_everywhere() -> None:
    for nodes, slots in ((4, 3), (5, 4), (6, 2)):
        counts = tuple([nodes * slots // (slots + 1)] * (slots + 1))
        assert optimal(counts, nodes, slots, family_counts(counts, nodes, slots))
    tail = complementary_tail((2, 2, 2), num_nodes=3, excess=1, parts=3)
    assert tail == (((1, 2), 1), ((0, 2), 1), ((0, 1), 1))


def test_every_candidate_fits_and_keeps_to_its_replicas() -> None:
    for nodes, slots, experts in ((5, 3, 5), (7, 2, 6), (6, 4, 7)):
        for counts in vectors(nodes, slots, experts):
            for member in family(counts, num_nodes=nodes, slots_per_node=slots):
                used = [0] * nodes
                expert = 0
                for held, width in member.blocks:
                    assert 1 <= len(held) <= counts[expert]
                    expert += width
                    for node in held:
                        used[node] += width
                assert expert == experts and max(used) <= slots


def test_the_search_is_never_worse_than_the_family_and_finds_what_needs_evicting() -> None:
    sets, score = searched((2, 2, 4, 4), num_nodes=4, slots_per_node=3)
    assert score == pytest.approx(1 + 1 + 5 / 6)
    assert len(sets) == 4
    for counts in ((3, 3, 5, 5, 5), (2, 3, 3, 4)):
        _, score = searched(counts, num_nodes=7, slots_per_node=3, evaluations=50)
        ours = family_counts(counts, 7, 3)
        assert score >= sum(a / comb(7, k) for k, a in enumerate(ours)) - 1e-12

"""The integer program: as oracle, with limits, and as a planner that is never worse; homes."""

from __future__ import annotations

import numpy as np
import pytest
from placement_search import searched
from scipy.optimize import linprog

from placement import PlacementRequest, certificate, plan
from placement.assignment.homes import choose_homes
from placement.exact.exact import ExactProblem, solve_exact, weighted_survival
from placement.survival.bitmasks import nodes_of


def zipf(layers: int, experts: int, power: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row = np.arange(1, experts + 1) ** -power
    return np.stack([rng.permutation(row) for _ in range(layers)]) * 1e4


def request(nodes: int, slots: int, **options: object) -> PlacementRequest:
    return PlacementRequest(num_nodes=nodes, slots_per_node=slots, **options)  # type: ignore[arg-type]


def lp_max_over_mean(load: np.ndarray, member: np.ndarray) -> float:
    pairs = np.argwhere(member)
    nodes = member.shape[1]
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    equal = np.zeros((len(load), len(pairs) + 1))
    equal[pairs[:, 0], np.arange(len(pairs))] = 1.0
    upper = np.zeros((nodes, len(pairs) + 1))
    upper[pairs[:, 1], np.arange(len(pairs))] = load[pairs[:, 0]]
    upper[:, -1] = -load.sum() / nodes
    return float(
        linprog(cost, A_ub=upper, b_ub=np.zeros(nodes), A_eq=equal, b_eq=np.ones(len(load))).fun
    )


def as_member(sets: tuple[int, ...], nodes: int) -> np.ndarray:
    member = np.zeros((1, len(sets), nodes), dtype=np.bool_)
    for expert, mask in enumerate(sets):
        member[0, expert, list(nodes_of(mask))] = True
    return member


@pytest.mark.parametrize(
    ("counts", "nodes", "slots"),
    [((2, 2, 2), 3, 2), ((2, 3, 3), 4, 2), ((3, 3, 3, 3), 4, 3), ((4,) * 5, 5, 4)],
)
def test_the_program_agrees_with_the_family(
    counts: tuple[int, ...], nodes: int, slots: int
) -> None:
    sets, _ = searched(counts, num_nodes=nodes, slots_per_node=slots, evaluations=50)
    problem = ExactProblem(
        num_experts=len(counts), num_nodes=nodes, slots_per_node=slots, max_replicas=(counts,)
    )
    start = as_member(sets, nodes)
    result = solve_exact(problem, start=start, limit_s=30)
    assert result.status == "optimal" and result.gap < 1e-6
    assert result.objective == pytest.approx(weighted_survival(start, problem))


def test_the_program_obeys_a_balance_limit() -> None:
    free = ExactProblem(
        num_experts=4, num_nodes=4, slots_per_node=2, max_replicas=((4,) * 4,), losses=(2,)
    )
    capped = ExactProblem(
        num_experts=4, num_nodes=4, slots_per_node=2, max_replicas=((4,) * 4,), losses=(2,),
        load=np.array([[8.0, 4.0, 2.0, 2.0]]), max_over_mean=1.01,
    )  # fmt: skip
    unbound = solve_exact(free, limit_s=30)
    bound = solve_exact(capped, limit_s=30)
    assert unbound.status == bound.status == "optimal"
    assert bound.objective <= unbound.objective + 1e-9
    assert bound.member is not None
    assert lp_max_over_mean(np.array([8.0, 4.0, 2.0, 2.0]), bound.member[0]) <= 1.01 + 1e-6


def test_a_problem_too_large_for_the_program_keeps_the_template_and_says_so() -> None:
    made = plan(request(40, 4, load=zipf(1, 32, 1.0), solver="ilp"))
    assert "too large" in made.notes[-1] and made.template


def test_a_small_plan_by_the_program_is_never_worse() -> None:
    load = zipf(1, 5, 1.2)
    ours = certificate(plan(request(5, 3, load=load)), load=load)
    ilp = certificate(plan(request(5, 3, load=load, solver="ilp")), load=load)
    assert sum(ilp.survival.values()) >= sum(ours.survival.values()) - 1e-9
    assert ilp.max_over_mean <= ours.max_over_mean + 0.01


def test_homes_are_level() -> None:
    load = np.array([[4.0, 3.0, 2.0, 1.0]])
    slots = np.array([[[0, 1], [0, 2], [1, 3]]], dtype=np.int32)
    home = choose_homes(load, slots)
    use = np.bincount(home[0], weights=load[0], minlength=3)
    assert use.max() == 4.0

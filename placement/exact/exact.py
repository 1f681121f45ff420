"""The placement problem as an integer program, for small problems and for comparison in tests.

Variables: x[l, e, n] is 1 if node n holds expert e of layer l; y[D] is 1 if the plan survives the
loss of the node set D. Constraints: slots per node, replicas per expert, and y[D] <= the number of
live replicas of each expert. With a balance cap, z[l, e, n] is the share of tokens that n serves.

The program is solved by PuLP with HiGHS in one thread within a time limit, from a known start.

Shapes: L layers, E experts, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from placement.request import Bools, Floats
from placement.survival.bitmasks import mask_of, minimal_sets

MAX_DEAD_SETS = 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactProblem:
    """An instance of the integer program.

    Attributes:
        num_experts: Experts per layer, E.
        num_nodes: Number of nodes, N.
        slots_per_node: Slots per node and layer.
        max_replicas: Most replicas of each expert, [L, E].
        min_replicas: Fewest replicas of every expert.
        losses: Numbers of lost nodes in the objective; 1 to N - 1 when empty.
        weights: Weight of each entry of ``losses``; equal when empty.
        load: Tokens per expert, [L, E]; required with ``max_over_mean``.
        max_over_mean: Upper bound on the busiest node's load over the mean, in every layer.
    """

    num_experts: int
    num_nodes: int
    slots_per_node: int
    max_replicas: tuple[tuple[int, ...], ...]
    min_replicas: int = 1
    losses: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    load: Floats | None = None
    max_over_mean: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactResult:
    """The outcome of the integer program.

    Attributes:
        status: "optimal", "time limit", "infeasible", "too large" or "no solver".
        member: bool [L, E, N], or None without a solution.
        objective: Weighted survival of ``member``.
        gap: Relative gap (bound - objective) / objective at the end; about 0 when optimal.
    """

    status: str
    member: Bools | None
    objective: float
    gap: float


def weighted_survival(member: Bools, problem: ExactProblem) -> float:
    """Return the program's objective for a placement, bool [L, E, N], by direct enumeration."""
    sets = minimal_sets(member)
    total = 0.0
    for losses, weight in _weights(problem):
        dead_sets = combinations(range(problem.num_nodes), losses)
        alive = sum(all(s & ~d for s in sets) for d in map(mask_of, dead_sets))
        total += weight * alive / comb(problem.num_nodes, losses)
    return total


def _weights(problem: ExactProblem) -> list[tuple[int, float]]:
    losses = problem.losses or tuple(range(1, problem.num_nodes))
    weights = problem.weights or (1.0,) * len(losses)
    return list(zip(losses, weights, strict=True))


def solve_exact(
    problem: ExactProblem, *, start: Bools | None = None, limit_s: float = 5.0
) -> ExactResult:
    """Find the placement with the largest weighted survival, within a time limit.

    Args:
        problem: The instance.
        start: A feasible placement, bool [L, E, N], from which the solver begins.
        limit_s: Time limit of the solver, in seconds.

    Returns:
        The best placement found; ``start`` if there is no solver or the problem is too large.
    """
    dead_sets = sum(comb(problem.num_nodes, k) for k, _ in _weights(problem))
    size = len(problem.max_replicas) * problem.num_experts * problem.num_nodes
    if dead_sets > MAX_DEAD_SETS or size > 4 * MAX_DEAD_SETS:
        return ExactResult(status="too large", member=start, objective=0.0, gap=float("inf"))
    try:
        import pulp
    except ImportError:
        return ExactResult(status="no solver", member=start, objective=0.0, gap=float("inf"))
    model, x = _model(pulp, problem)
    solver = _solver(pulp, x, start, limit_s)
    if not solver.available():
        return ExactResult(status="no solver", member=start, objective=0.0, gap=float("inf"))
    model.solve(solver)
    return _result(pulp, model, x, problem, start)


def _model(pulp: Any, problem: ExactProblem) -> tuple[Any, dict[Any, Any]]:
    model = pulp.LpProblem("placement", pulp.LpMaximize)
    layers, experts = range(len(problem.max_replicas)), range(problem.num_experts)
    nodes = range(problem.num_nodes)
    x = {
        (layer, e, n): model.add_variable(f"x_{layer}_{e}_{n}", cat="Binary")
        for layer in layers
        for e in experts
        for n in nodes
    }
    terms = []
    for losses, weight in _weights(problem):
        for index, dead in enumerate(combinations(nodes, losses)):
            y = model.add_variable(f"y_{losses}_{index}", lowBound=0, upBound=1)
            terms.append(weight / comb(problem.num_nodes, losses) * y)
            alive = [n for n in nodes if n not in dead]
            for layer in layers:
                for e in experts:
                    model += y <= pulp.lpSum(x[layer, e, n] for n in alive)
    model.setObjective(pulp.lpSum(terms))
    for layer in layers:
        for n in nodes:
            model += pulp.lpSum(x[layer, e, n] for e in experts) <= problem.slots_per_node
        for e in experts:
            copies = pulp.lpSum(x[layer, e, n] for n in nodes)
            model += copies <= min(problem.max_replicas[layer][e], problem.num_nodes)
            model += copies >= problem.min_replicas
    _add_balance(pulp, model, x, problem)
    return model, x


def _add_balance(pulp: Any, model: Any, x: dict[Any, Any], problem: ExactProblem) -> None:
    if problem.max_over_mean is None:
        return
    if problem.load is None:
        raise ValueError("max_over_mean needs the load")
    for layer, load_E in enumerate(problem.load):
        total = float(load_E.sum())
        if total <= 0:
            continue
        share = {}
        for e, load in enumerate(load_E):
            for n in range(problem.num_nodes):
                z = model.add_variable(f"z_{layer}_{e}_{n}", lowBound=0)
                model += z <= float(load) / total * x[layer, e, n]
                share[e, n] = z
            row = (share[e, n] for n in range(problem.num_nodes))
            model += pulp.lpSum(row) == float(load) / total
        for n in range(problem.num_nodes):
            use = pulp.lpSum(share[e, n] for e in range(problem.num_experts))
            model += use <= problem.max_over_mean / problem.num_nodes


def _solver(pulp: Any, x: dict[Any, Any], start: Bools | None, limit_s: float) -> Any:
    class Started(pulp.HiGHS):  # type: ignore[misc]
        """HiGHS solver that begins from a known placement."""

        def callSolver(self, lp: Any) -> None:
            if start is not None:
                at = [var.index for var in x.values()]
                values = [float(start[key]) for key in x]
                lp.solverModel.setSolution(len(at), np.array(at), np.array(values))
            lp.solverModel.run()

    return Started(msg=False, threads=1, timeLimit=limit_s)


def _result(
    pulp: Any, model: Any, x: dict[Any, Any], problem: ExactProblem, start: Bools | None
) -> ExactResult:
    info = model.solverModel.getInfo()
    values = [var.value() for var in x.values()]
    infeasible = model.status == pulp.LpStatusInfeasible
    if infeasible or any(v is None for v in values):
        status = "infeasible" if infeasible else "time limit"
        return ExactResult(status=status, member=start, objective=0.0, gap=float("inf"))
    shape = (len(problem.max_replicas), problem.num_experts, problem.num_nodes)
    member = np.zeros(shape, dtype=np.bool_)
    for key, value in zip(x, values, strict=True):
        member[key] = value > 0.5
    objective = weighted_survival(member, problem)
    gap = max(0.0, float(-info.mip_dual_bound) - objective) / max(objective, 1e-12)
    closed = gap <= 1e-6 or str(model.solverModel.getModelStatus()).endswith("kOptimal")
    return ExactResult(
        status="optimal" if closed else "time limit", member=member, objective=objective, gap=gap
    )

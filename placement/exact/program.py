"""Plan by the integer program, starting from the template's plan and never worse than that plan.

The program maximizes the weighted survival of all layers together. The load of the busiest node may
not exceed that of the template's plan. If the problem is too large, there is no solver or time runs
out, the better of the two plans is used, and the plan's notes say so. The program treats all nodes
as alike; afterwards nodes are permuted to account for racks and hazards.
"""

from __future__ import annotations

from math import comb

import numpy as np

from placement.assignment.build import draft_of, plan_of
from placement.assignment.select import Choice, plan_of_choice
from placement.balance.shares import balance_of
from placement.exact.exact import ExactProblem, ExactResult, solve_exact, weighted_survival
from placement.migration.migrate import relabelled_member
from placement.plan import Plan
from placement.request import Bools, PlacementRequest
from placement.survival.bitmasks import minimal_sets, nodes_of
from placement.templates.order import improved_order
from placement.templates.template import Template

_EVERY_LOSS_UP_TO = 8
_FEW_LOSSES = (1, 2, 3)
_SLACK = 1e-4
_AUTO_ROWS = 160  # measured: 0.8 s for 150 rows, at least 8 s from 240 rows (5 nodes)


def is_small(request: PlacementRequest) -> bool:
    """Return whether ``solver="auto"`` uses the program: at most 160 survival constraints.

    There is one constraint per layer, expert and set of lost nodes: 4 nodes x 8 experts have 112,
    5 nodes x 5 experts have 150.
    """
    sets = sum(comb(request.num_nodes, k) for k in _losses(request.num_nodes))
    return request.solver == "auto" and sets * request.load.size <= _AUTO_ROWS


def by_program(
    request: PlacementRequest, choice: Choice, *, floor: int, notes: tuple[str, ...]
) -> Plan:
    """Return the program's plan if its survival is better than the template's, else the template's.

    Args:
        request: Loads, nodes and slots.
        choice: The best template, with all layers placed.
        floor: Fewest distinct nodes of every expert.
        notes: Notes of the plan in either case.
    """
    assert choice.draft is not None, "the choice is placed"
    start = choice.draft.member
    problem = _problem(request, start, floor)
    result = solve_exact(problem, start=start, limit_s=request.solver_limit_s)
    # The result at a time limit depends on the machine; "auto" must give the same plan everywhere.
    taken = ("optimal",) if request.solver == "auto" else ("optimal", "time limit")
    found = result.member if result.status in taken else None
    if found is not None and result.objective > weighted_survival(start, problem) + 1e-9:
        return plan_of(
            request,
            draft_of(request, _on_real_nodes(request, found)),
            template=(),
            method=f"ilp ({_outcome(result)})",
            notes=notes,
        )
    said = f"ilp: {_outcome(result)}; {choice.name} kept"
    return plan_of_choice(request, choice, notes=(*notes, said))


def _problem(request: PlacementRequest, start: Bools, floor: int) -> ExactProblem:
    nodes, losses = request.num_nodes, _losses(request.num_nodes)
    ratio_L = balance_of(request.load, start)
    return ExactProblem(
        num_experts=request.num_experts,
        num_nodes=nodes,
        slots_per_node=request.slots_per_node,
        max_replicas=((nodes,) * request.num_experts,) * request.num_layers,
        min_replicas=floor,
        losses=losses,
        weights=tuple(0.5**k for k in losses),
        load=request.load,
        max_over_mean=float(np.max(ratio_L)) + _SLACK,
    )


def _losses(num_nodes: int) -> tuple[int, ...]:
    return tuple(range(1, num_nodes)) if num_nodes <= _EVERY_LOSS_UP_TO else _FEW_LOSSES


def _on_real_nodes(request: PlacementRequest, member: Bools) -> Bools:
    """Permute the nodes of a placement so that its minimal node sets span racks."""
    sets: Template = tuple((nodes_of(m), 1) for m in minimal_sets(member))
    order = list(range(request.num_nodes))
    return relabelled_member(
        member, np.array(improved_order(sets, order, request.domains, request.hazards))
    )


def _outcome(result: ExactResult) -> str:
    if result.status == "time limit" and np.isfinite(result.gap):
        return f"time limit, gap {result.gap:.1%}"
    return result.status

"""A plan by the integer program, at planned moments: started from the template's plan, never worse.

The program maximises the weighted survival of all layers together, under a cap on every layer's
busiest node: that of the template's plan. Where it does not fit, has no solver or runs out of
time, the better of the two stands, and the plan says so. Nodes are alike to the program; racks and
hazards then decide which node plays which part.
"""

from __future__ import annotations

from math import comb

import numpy as np

from placement.assignment.build import draft_of, plan_of
from placement.assignment.select import Choice
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
_AUTO_ROWS = 160  # measured: 0.8 s at 150 rows, 8 s and more from 240 on (5 nodes)


def is_small(request: PlacementRequest) -> bool:
    """Whether ``solver="auto"`` uses the program: at most 160 rows that tie dead sets to experts.

    There is one row for each layer, expert and dead set. 4 nodes x 8 experts has 112, 5 x 5 150.
    """
    sets = sum(comb(request.num_nodes, k) for k in _losses(request.num_nodes))
    return request.solver == "auto" and sets * request.load.size <= _AUTO_ROWS


def by_program(
    request: PlacementRequest, choice: Choice, *, floor: int, notes: tuple[str, ...]
) -> Plan:
    """The program's plan if it survives more than the template's, else the template's.

    Args:
        choice: The best template, placed.
        floor: Distinct nodes that every expert must have.
        notes: What to say in any case.
    """
    assert choice.draft is not None, "the choice is placed"
    start = choice.draft.member
    problem = _problem(request, start, floor)
    result = solve_exact(problem, start=start, limit_s=request.solver_limit_s)
    # What a time limit leaves depends on the machine; "auto" promises the same plan everywhere.
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
    return plan_of(
        request,
        choice.draft,
        template=choice.template,
        block=choice.block,
        method=choice.name,
        notes=(*notes, said),
    )


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
    """The program's nodes played by real ones, so that its minimal sets span racks."""
    sets: Template = tuple((nodes_of(m), 1) for m in minimal_sets(member))
    order = list(range(request.num_nodes))
    return relabelled_member(
        member, np.array(improved_order(sets, order, request.domains, request.hazards))
    )


def _outcome(result: ExactResult) -> str:
    if result.status == "time limit" and np.isfinite(result.gap):
        return f"time limit, gap {result.gap:.1%}"
    return result.status

"""The library's own placement policy: ``plan`` from scratch, ``replan`` after a change of nodes."""

from __future__ import annotations

import importlib
from typing import Protocol

from placement.assignment.select import (
    Choice,
    best_template,
    failure_score,
    plan_of_choice,
    price_of,
)
from placement.balance.shares import balance_of
from placement.errors import InfeasiblePlacementError, InvalidRequestError
from placement.exact.program import by_program, is_small
from placement.migration.repair import (
    in_place,
    relabelled,
    repaired_template,
    same_shape,
    surviving,
)
from placement.plan import Plan
from placement.request import PlacementRequest, feasible_floor

_WORTH_LOOKING = 0.03  # no other template is tried while the kept plan costs less than this
_WORTH_MOVING = 0.02  # a rebalance changes the template only if that saves at least this much


class PlacementPolicy(Protocol):
    """A callable that decides which ranks hold which experts.

    A policy must be pure: the same arguments always give the same plan, on every machine.
    ``placement.testing.conformance`` checks a policy of your own.
    """

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """Return the plan for ``request``.

        Args:
            request: Loads, nodes and slots after the change.
            previous: The plan in force until now; None at the start.
            lost: Ids of nodes of ``previous`` whose replicas are gone.

        Raises:
            InfeasiblePlacementError: The experts do not fit.
        """
        ...


def policy_from_path(path: str) -> PlacementPolicy:
    """Import the policy at a dotted path, ``package.module.name`` or ``package.module:name``.

    If the path names a class, it is instantiated without arguments.

    Raises:
        InvalidRequestError: There is no such module or name, or the object is not callable.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise InvalidRequestError(f"policy {path!r} is no dotted path such as package.module.name")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidRequestError(f"policy {path!r}: {error}") from error
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise InvalidRequestError(f"policy {path!r} needs arguments: {error}") from error
    if not callable(found):
        raise InvalidRequestError(f"policy {path!r} is a {type(found).__name__}, not callable")
    policy: PlacementPolicy = found
    return policy


def plan(request: PlacementRequest) -> Plan:
    """Make a plan from scratch.

    With ``solver="auto"`` the integer program is used if the problem is small
    (``program.is_small``) and solved to optimality within the time limit; with ``"ilp"`` it is
    always tried. The plan's ``method`` or ``notes`` say how that ended.

    Args:
        request: Loads, nodes and slots.

    Raises:
        InfeasiblePlacementError: The experts do not fit, or min_replicas > num_nodes.
    """
    if request.min_replicas > request.num_nodes:
        raise InfeasiblePlacementError(
            f"min_replicas={request.min_replicas} copies on distinct nodes need that many nodes, "
            f"but there are {request.num_nodes}; add {request.min_replicas - request.num_nodes} "
            f"nodes or use min_replicas <= {request.num_nodes}"
        )
    return _plan(request, program=request.solver == "ilp" or is_small(request))


def _plan(request: PlacementRequest, *, program: bool) -> Plan:
    floor, notes = lowered_floor(request)
    choice = best_template(request, floor)
    if program:
        return by_program(request, choice, floor=floor, notes=notes)
    return plan_of_choice(request, choice, notes=notes)


def lowered_floor(request: PlacementRequest) -> tuple[int, tuple[str, ...]]:
    """Return the replica floor that fits, and a note if it is below ``request.min_replicas``."""
    floor = feasible_floor(
        num_experts=request.num_experts,
        num_nodes=request.num_nodes,
        slots_per_node=request.slots_per_node,
        min_replicas=request.min_replicas,
    )
    if floor == request.min_replicas:
        return floor, ()
    return floor, (
        f"floor lowered from {request.min_replicas} to {floor}: {request.num_nodes} nodes x "
        f"{request.slots_per_node} slots for {request.num_experts} experts",
    )


def replan(
    request: PlacementRequest,
    *,
    previous: Plan | None,
    lost: frozenset[int] = frozenset(),
    rebalance: bool = False,
) -> Plan:
    """Make the next plan after losses, joins or a rebalance: the library's default policy.

    Replicas stay where they are as far as possible. Without a change of nodes and without
    ``rebalance`` the previous plan is returned.

    Args:
        request: Loads, nodes and slots after the change; ``node_ids`` lists the nodes.
        previous: The plan in force until now, or None at the start.
        lost: Ids of nodes whose replicas are gone.
        rebalance: Adapt replicas and shares to the loads even if the nodes are the same.

    Raises:
        InfeasiblePlacementError: The experts do not fit.
        InvalidRequestError: A node is both a member and lost.

    The integer program runs only at a start without losses and with ``solver="ilp"``. Its plans
    have no template to keep when a node is lost, and after a loss there is no time for the program.
    """
    if previous is None:
        return _plan(request, program=request.solver == "ilp" and not lost)
    gone = sorted(set(request.node_ids) & lost)
    if gone:
        raise InvalidRequestError(f"nodes {gone} are both members and lost")
    if not same_shape(previous, request):
        return _plan(request, program=False)
    if request.node_ids == previous.node_ids and not rebalance:
        return previous
    kept = _kept(request, previous, rebalance=rebalance)
    if rebalance and (price := _price_of_plan(request, kept)) > _WORTH_LOOKING:
        fresh = best_template(request, lowered_floor(request)[0])
        if price_of(request, fresh) + _WORTH_MOVING < price:
            return _relabelled(request, previous, fresh, rebalance=True)
    return kept


def _kept(request: PlacementRequest, previous: Plan, *, rebalance: bool) -> Plan:
    """Plan on the previous template if it still fits the nodes, else on a relabelled new one."""
    floor, notes = lowered_floor(request)
    member, origin = surviving(previous, request)
    template = repaired_template(previous, request, member=member, origin=origin, floor=floor)
    if template is None:
        return _relabelled(request, previous, best_template(request, floor), rebalance=rebalance)
    return in_place(
        previous,
        request,
        template=template,
        block_LE=previous.block,
        member=member,
        origin=origin,
        method="in place",
        notes=notes,
        rebalance=rebalance,
    )


def _relabelled(
    request: PlacementRequest, previous: Plan, fresh: Choice, *, rebalance: bool
) -> Plan:
    """Plan on a new template whose positions are assigned so that few replicas move."""
    assert fresh.block is not None, "the choice is placed"
    member, origin = surviving(previous, request)
    template, block = relabelled(fresh.template, member, fresh.block, request)
    return in_place(
        previous,
        request,
        template=template,
        block_LE=block,
        member=member,
        origin=origin,
        method=f"relabelled {fresh.name}",
        notes=lowered_floor(request)[1],
        rebalance=rebalance,
    )


def _price_of_plan(request: PlacementRequest, plan: Plan) -> float:
    ratio_L = balance_of(request.load, plan.node_member)
    failure = failure_score(plan.template, num_nodes=plan.num_nodes)
    core = sum(len(nodes) * width for nodes, width in plan.template)
    as_choice = Choice(
        template=plan.template,
        name=plan.method,
        failure=failure,
        core=core / (plan.num_nodes * plan.slots_per_node),
        excess=float(ratio_L.mean()) - 1.0,
    )
    return price_of(request, as_choice)

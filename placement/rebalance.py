"""When to rebalance: accumulated regret against the cost of moving.

Every step on a plan that is worse than the best known candidate adds the predicted time saving to
the regret. A move is due when the regret exceeds ``alpha`` times the cost of the move. This rule
needs no forecast of how long the loads stay as they are. All functions are pure: the caller keeps
the ``Regret``. All times are in units of one training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.balance.shares import balance_of, max_over_mean
from placement.errors import InvalidRequestError
from placement.migration.migrate import busiest, transfers
from placement.plan import Plan
from placement.policy import replan
from placement.request import Floats, PlacementRequest, as_load

ALPHA = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Regret:
    """Time lost so far by staying on the present plan, in steps."""

    value: float = 0.0


def accumulated(
    regret: Regret, *, gain: float, steps: int, cost: float, alpha: float = ALPHA
) -> tuple[Regret, bool]:
    """Return the regret after ``steps`` more steps, and whether a move is due.

    Args:
        gain: Predicted time saved per step by the better plan, in steps; <= 0 adds nothing.
        steps: Steps since the last call.
        cost: Time the move takes, in steps.
        alpha: Regret over cost at which to move. Lower it to rebalance more eagerly.

    Returns:
        The new regret (zero if a move is due) and True if a move is due.

    Raises:
        InvalidRequestError: A value is not finite, or a value other than ``gain`` is negative.
    """
    for name, value in (("steps", steps), ("cost", cost), ("alpha", alpha)):
        if not (np.isfinite(value) and value >= 0):
            raise InvalidRequestError(f"{name}={value} must be a finite number >= 0")
    if not np.isfinite(gain):
        raise InvalidRequestError(f"gain={gain} must be a finite number")
    if gain <= 0:
        return regret, False
    value = regret.value + gain * steps
    if value > alpha * cost:
        return Regret(), True
    return Regret(value=value), False


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveCost:
    """Cost of a move, in steps: a fixed part, plus one per replica into the busiest rank."""

    fixed: float = 0.1
    per_replica: float = 0.1


def considered(
    regret: Regret,
    request: PlacementRequest,
    *,
    previous: Plan,
    steps: int,
    cost: MoveCost,
    moe_part: float = 0.6,
    alpha: float = ALPHA,
    latest: Sequence[Any] | npt.NDArray[Any] | None = None,
) -> tuple[Regret, Plan | None]:
    """Return the regret after ``steps`` more steps, and the plan to move to if a move is due.

    Args:
        regret: Regret so far.
        request: The present nodes, with smoothed loads.
        previous: The plan in force.
        steps: Steps since the last call.
        cost: Cost of a move, in steps.
        moe_part: Fraction of a step's time that is proportional to max/mean node load.
        alpha: See ``accumulated``.
        latest: The newest loads without smoothing, on which the gain is judged; shares still come
            from the smoothed loads. None: judge on the smoothed loads.

    Returns:
        The new regret, and the plan to move to or None.
    """
    candidate = replan(request, previous=previous, rebalance=True)
    if candidate == previous:
        return regret, None
    newest = request.load if latest is None else as_load(latest)
    if todo := transfers(previous, candidate):
        gain = _excess_on(newest, previous, request.load)
        gain -= _excess_on(newest, candidate, request.load)
        price = cost.fixed + cost.per_replica * busiest(todo)[1]
    else:  # the same replicas with other shares and homes
        gain = _served_excess(newest, previous) - _served_excess(newest, candidate)
        price = cost.fixed
    gain *= moe_part
    regret, due = accumulated(regret, gain=gain, steps=steps, cost=price, alpha=alpha)
    return regret, candidate if due else None


def _excess_on(load: Floats, plan: Plan, share_load: Floats) -> float:
    return float(balance_of(load, plan.node_member, share_load=share_load).mean()) - 1.0


def _served_excess(load: Floats, plan: Plan) -> float:
    """Excess of max/mean node load as served: the mean of spread mode (shares) and home mode."""
    homes = np.zeros((plan.num_layers, plan.num_nodes))
    layer = np.arange(plan.num_layers)[:, None]
    np.add.at(homes, (layer, plan.home // plan.ranks_per_node), load)
    both = max_over_mean(homes), max_over_mean(plan.loads_of_nodes(load))
    return float(np.mean(both)) - 1.0

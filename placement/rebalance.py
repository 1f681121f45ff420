"""When to rebalance: accumulated regret against the cost of moving. Pure; the caller keeps state.

Each step that runs on a worse plan than it could adds the predicted gain to the regret. When the
regret exceeds ``alpha`` times the cost of moving, moving has paid for itself in hindsight, and it
is done. There is no horizon to guess.
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
SMOOTHING = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Regret:
    """What has been lost so far by not moving, in steps' time."""

    value: float = 0.0


def smoothed_load(
    previous: Floats | None,
    load: Sequence[Any] | npt.NDArray[Any],
    *,
    memory: float = SMOOTHING,
) -> Floats:
    """Exponential mean of loads [L, E]; ``memory`` is the weight of the past.

    Raises:
        InvalidRequestError: ``memory`` outside [0, 1) or another shape than before.
    """
    if not 0.0 <= memory < 1.0:
        raise InvalidRequestError(f"memory={memory} must be in [0, 1)")
    now = as_load(load)
    if previous is None:
        return now
    if previous.shape != now.shape:
        raise InvalidRequestError(f"loads of shape {now.shape} after {previous.shape}")
    return memory * previous + (1.0 - memory) * now


def accumulated(
    regret: Regret, *, gain: float, steps: int, cost: float, alpha: float = ALPHA
) -> tuple[Regret, bool]:
    """The regret after ``steps`` more steps, and whether moving is due.

    Args:
        gain: Predicted time saved per step by the better plan, in steps; <= 0 adds nothing.
        steps: Steps since the last call.
        cost: Time the move takes, in steps.
        alpha: Fraction of the cost at which to move.

    Raises:
        InvalidRequestError: A figure that is negative or no number.
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
    """What a move costs, in steps: a fixed part and one for each replica into the busiest rank."""

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
    """The regret after ``steps`` more steps and the plan to move to, if moving is due.

    Args:
        request: The present members, with smoothed loads.
        previous: The plan in force.
        moe_part: Part of a step's time that grows with max/mean node load.
        latest: The newest loads as they were; the gain is judged on them, with shares made from
            the smoothed ones. The smoothed loads themselves when None.
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
    """The same as the plan serves it: the mean over its shares and its homes, which modes use."""
    homes = np.zeros((plan.num_layers, plan.num_nodes))
    layer = np.arange(plan.num_layers)[:, None]
    np.add.at(homes, (layer, plan.home // plan.ranks_per_node), load)
    both = max_over_mean(homes), max_over_mean(plan.loads_of_nodes(load))
    return float(np.mean(both)) - 1.0

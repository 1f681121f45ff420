"""The certificate of a plan: survival of k losses, weakest set of nodes, balance and floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.balance.shares import max_over_mean
from placement.errors import InvalidRequestError
from placement.plan import Plan
from placement.request import as_load
from placement.survival.bitmasks import minimal_sets, nodes_of
from placement.survival.resilience import domain_masks, survival, survival_under_hazards
from placement.templates.template import masks


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Measured properties of a plan, computed from the placement alone, not from its claims.

    Attributes:
        survival: Number of lost nodes -> probability that every expert of every layer keeps a
            replica, if the lost nodes are chosen uniformly.
        low: Lower ends of the confidence intervals of ``survival``; equal to ``survival`` where
            the probabilities are exact.
        high: Upper ends of the intervals.
        method: How the probabilities were found; see ``survival.resilience``.
        fatal_nodes: Ids of a smallest set of nodes whose loss destroys all replicas of an expert.
        fatal_experts: The (layer, expert) pairs that the loss of ``fatal_nodes`` destroys.
        max_over_mean: Load of the busiest node over the mean, averaged over layers.
        worst_max_over_mean: Load of the busiest node over the mean in the worst layer.
        min_distinct_nodes: Fewest distinct nodes that hold any expert.
        domain_survival: Number of lost racks or zones -> probability that every expert survives;
            empty if no domains were given.
        hazard_survival: Probability that every expert survives if each node fails with its own
            hazard; None if no hazards were given, or if an exact answer would take too long.
    """

    survival: dict[int, float]
    low: dict[int, float]
    high: dict[int, float]
    method: str
    fatal_nodes: tuple[int, ...]
    fatal_experts: tuple[tuple[int, int], ...]
    max_over_mean: float
    worst_max_over_mean: float
    min_distinct_nodes: int
    domain_survival: dict[int, float]
    hazard_survival: float | None

    @property
    def exact(self) -> bool:
        """Whether every probability is exact, neither estimated nor a bound."""
        return self.method not in ("estimate", "template bound")

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as a JSON-serializable dictionary."""
        return {
            "survival": {str(k): p for k, p in self.survival.items()},
            "interval": {str(k): [self.low[k], self.high[k]] for k in self.survival},
            "method": self.method,
            "fatal_nodes": list(self.fatal_nodes),
            "fatal_experts": [list(pair) for pair in self.fatal_experts],
            "max_over_mean": self.max_over_mean,
            "worst_max_over_mean": self.worst_max_over_mean,
            "min_distinct_nodes": self.min_distinct_nodes,
            "domain_survival": {str(k): p for k, p in self.domain_survival.items()},
            "hazard_survival": self.hazard_survival,
        }

    def table(self) -> str:
        """Return the certificate as a few lines of text."""
        shown = [k for k in self.survival if k and (k <= 4 or 0.0 < self.survival[k] < 1.0)][:12]
        chance = "   ".join(f"{k}: {self._chance(k)}" for k in shown)
        experts = ", ".join(f"{e}" if not la else f"{la}/{e}" for la, e in self.fatal_experts[:6])
        more = len(self.fatal_experts) - 6
        lines = [
            f"survives losses of   {chance}   ({self.method})",
            f"fatal set            nodes {list(self.fatal_nodes)} would lose experts {experts}"
            + (f" and {more} more" if more > 0 else ""),
            f"max/mean load        {self.max_over_mean:.3f} (worst layer "
            f"{self.worst_max_over_mean:.3f})",
            f"distinct nodes       >= {self.min_distinct_nodes}",
        ]
        if self.domain_survival:
            zones = "   ".join(f"{k}: {p:.1%}" for k, p in self.domain_survival.items() if k)
            lines.append(f"survives domains     {zones}")
        if self.hazard_survival is not None:
            lines.append(f"under node hazards   {self.hazard_survival:.4%}")
        return "\n".join(lines)

    def _chance(self, k: int) -> str:
        if self.low[k] == self.high[k]:
            return f"{self.survival[k]:.1%}"
        if self.method == "template bound":
            return f">= {self.survival[k]:.1%}"
        return f"{self.survival[k]:.1%} ({self.low[k]:.1%}..{self.high[k]:.1%})"


def certificate(
    plan: Plan,
    *,
    load: Sequence[Any] | npt.NDArray[Any] | None = None,
    max_losses: int | None = None,
    domains: Sequence[int | str] = (),
    hazards: Sequence[float] = (),
) -> Certificate:
    """Compute the certificate of a plan, whichever policy made the plan.

    Args:
        plan: The plan.
        load: Loads for the balance, [L, E] or [E]; equal loads when None.
        max_losses: Largest number of lost nodes to compute; N when None.
        domains: Rack or zone of each node position, for ``domain_survival``.
        hazards: Failure probability of each node position, for ``hazard_survival``.

    Raises:
        InvalidRequestError: The load does not have the plan's shape, or an expert has no replica.
    """
    member = plan.node_member
    sets = minimal_sets(member)
    found = survival(
        sets, num_nodes=plan.num_nodes, max_losses=max_losses, bound=masks(plan.template)
    )
    weakest = nodes_of(sets[0])
    dead = np.zeros(plan.num_nodes, dtype=np.bool_)
    dead[list(weakest)] = True
    killed = np.argwhere(~(member & ~dead).any(2))
    load_LE = np.ones(member.shape[:2]) if load is None else as_load(load)
    if load_LE.shape != member.shape[:2]:
        raise InvalidRequestError(
            f"load of shape {load_LE.shape} for a plan of {member.shape[0]} layers x "
            f"{member.shape[1]} experts"
        )
    ratio_L = max_over_mean(plan.loads_of_nodes(load_LE))
    return Certificate(
        survival=dict(enumerate(found.probability)),
        low=dict(enumerate(found.low)),
        high=dict(enumerate(found.high)),
        method=found.method,
        fatal_nodes=tuple(plan.node_ids[n] for n in weakest),
        fatal_experts=tuple((int(a), int(b)) for a, b in killed),
        max_over_mean=float(ratio_L.mean()),
        worst_max_over_mean=float(ratio_L.max()),
        min_distinct_nodes=int(plan.replicas.min()),
        domain_survival=_domain_survival(sets, domains),
        hazard_survival=survival_under_hazards(sets, hazards=hazards) if len(hazards) else None,
    )


def _domain_survival(sets: Sequence[int], domains: Sequence[int | str]) -> dict[int, float]:
    if not len(domains):
        return {}
    names = sorted(set(domains), key=str)
    of_node = [names.index(d) for d in domains]
    found = survival(domain_masks(sets, of_node), num_nodes=len(names))
    return dict(enumerate(found.probability))

"""The input of a planner: loads, nodes, slots, replica floor and the weight of resilience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasiblePlacementError, InvalidRequestError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

PROFILES: dict[str, float] = {"balanced": 0.1, "safe": 3.0}
"""Excess of max/mean node load that one unit of failure score is worth, by profile."""

SOLVERS = ("auto", "greedy", "ilp")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementRequest:
    """All inputs of a plan. The constructor checks and copies the arrays and makes them read-only.

    Attributes:
        load: Tokens routed to each expert, shape [L, E] (or [E] for one layer), each >= 0.
        num_nodes: Number of nodes (machines). A node fails as a whole.
        slots_per_node: Experts of one layer that a node can hold, over all its ranks. A multiple
            of ``ranks_per_node``.
        min_replicas: Replicas wanted of every expert, on distinct nodes (the floor): f replicas
            survive the loss of any f - 1 nodes.
        ranks_per_node: Processes per node; rank r runs on node position r // ranks_per_node.
        node_ids: Stable ids of the node positions, ascending; 0..N-1 when empty.
        domains: Rack or zone of each node position. Set this where a rack or zone can fail as a
            whole; empty means that nodes fail independently.
        hazards: Chance that each node position fails, 0 to 1. Set this where some nodes are less
            reliable than others; empty means that all are alike.
        profile: "balanced" puts even load first, "safe" the survival of losses.
        resilience_weight: Factor on the profile's price of failures; 0 plans for balance alone.
        solver: "greedy" never uses the integer program. "ilp" uses the program in ``plan`` and for
            the first plan of ``replan``. "auto" uses the program in ``plan`` if the problem is
            small (``program.is_small``).
        solver_limit_s: Time limit of the integer program, in seconds.

    Raises:
        InvalidRequestError: A field has an invalid value; the message names field and value.
    """

    load: Any
    num_nodes: int
    slots_per_node: int
    min_replicas: int = 2
    ranks_per_node: int = 1
    node_ids: tuple[int, ...] = ()
    domains: tuple[int | str, ...] = ()
    hazards: tuple[float, ...] = ()
    profile: str = "balanced"
    resilience_weight: float = 1.0
    solver: str = "auto"
    solver_limit_s: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "load", as_load(self.load))
        for name in ("num_nodes", "slots_per_node", "min_replicas", "ranks_per_node"):
            object.__setattr__(self, name, positive_int(getattr(self, name), name=name))
        if self.slots_per_node % self.ranks_per_node:
            raise InvalidRequestError(
                f"slots_per_node={self.slots_per_node} is no multiple of ranks_per_node="
                f"{self.ranks_per_node}; every rank of a node has the same number of slots"
            )
        ids = tuple(map(int, self.node_ids)) or tuple(range(self.num_nodes))
        if len(ids) != self.num_nodes:
            raise InvalidRequestError(f"{len(ids)} node_ids for num_nodes={self.num_nodes}")
        if any(map(ge, ids, ids[1:])):
            raise InvalidRequestError(f"node_ids must be distinct and ascending, not {ids}")
        object.__setattr__(self, "node_ids", ids)
        object.__setattr__(self, "domains", self._per_node("domains"))
        object.__setattr__(self, "hazards", as_hazards(self._per_node("hazards")))
        self._check_taste()

    def _per_node(self, name: str) -> tuple[Any, ...]:
        values = tuple(getattr(self, name))
        if values and len(values) != self.num_nodes:
            raise InvalidRequestError(f"{len(values)} {name} for num_nodes={self.num_nodes}")
        return values

    def _check_taste(self) -> None:
        if self.profile not in PROFILES:
            raise InvalidRequestError(f"profile {self.profile!r} is none of {sorted(PROFILES)}")
        if self.solver not in SOLVERS:
            raise InvalidRequestError(f"solver {self.solver!r} is none of {SOLVERS}")
        weight = float(self.resilience_weight)
        if not (np.isfinite(weight) and weight >= 0):
            raise InvalidRequestError(f"resilience_weight={weight} must be finite and >= 0")
        if not (np.isfinite(self.solver_limit_s) and self.solver_limit_s > 0):
            raise InvalidRequestError(f"solver_limit_s={self.solver_limit_s} must be > 0")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        """Number of experts per layer, E."""
        return int(self.load.shape[1])

    @property
    def failure_price(self) -> float:
        """Price of one unit of failure score, in excess of max/mean node load over 1."""
        return PROFILES[self.profile] * float(self.resilience_weight)


def as_load(load: Sequence[Any] | npt.NDArray[Any]) -> Floats:
    """Convert loads to a read-only float64 array [L, E]; one layer may be given as [E].

    Raises:
        InvalidRequestError: Layers of unequal length, no experts, or a value that is not a finite
            number >= 0.
    """
    if isinstance(load, Sequence) and load and isinstance(load[0], Sequence | np.ndarray):
        lengths = [len(row) if hasattr(row, "__len__") else -1 for row in load]
        if len(set(lengths)) > 1:
            raise InvalidRequestError(f"layers have unequal numbers of experts: {lengths[:16]}")
    try:
        array = np.array(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"load is not an array of numbers: {error}") from error
    if array.ndim == 1:
        array = array[None, :]
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidRequestError(f"load has shape {array.shape}; wanted [layers, experts]")
    bad = ~np.isfinite(array) | (array < 0)
    if bad.any():
        layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidRequestError(
            f"load of layer {layer}, expert {expert} is {array[layer, expert]}; "
            f"loads are finite and >= 0 ({int(bad.sum())} of {array.size} are not)"
        )
    with np.errstate(over="ignore"):
        total_L = array.sum(1)
    if not np.isfinite(total_L).all():
        raise InvalidRequestError("the loads of a layer add up to infinity; scale them down")
    array.setflags(write=False)
    return array


def as_hazards(values: Sequence[float]) -> tuple[float, ...]:
    """Convert node hazards (chances to fail) to floats.

    Raises:
        InvalidRequestError: A hazard is negative, above 1 or not finite.
    """
    hazards = tuple(float(v) for v in values)
    for node, hazard in enumerate(hazards):
        if not 0.0 <= hazard <= 1.0:
            raise InvalidRequestError(f"hazard of node {node} is {hazard}; wanted 0 <= h <= 1")
    return hazards


def positive_int(value: Any, *, name: str) -> int:
    """Return ``value`` as an int >= 1; ``name`` is used in the error message.

    Raises:
        InvalidRequestError: ``value`` is not a whole number >= 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or int(value) < 1:
        raise InvalidRequestError(f"{name}={value!r} must be a whole number >= 1")
    return int(value)


def feasible_floor(
    *, num_experts: int, num_nodes: int, slots_per_node: int, min_replicas: int
) -> int:
    """Return the largest replica floor <= ``min_replicas`` that fits nodes and slots, at least 1.

    Raises:
        InfeasiblePlacementError: Not even one copy of each expert fits.
    """
    slots = num_nodes * slots_per_node
    if slots < num_experts:
        nodes = -(-num_experts // slots_per_node)
        raise InfeasiblePlacementError(
            f"{num_experts} experts do not fit: {num_nodes} nodes x {slots_per_node} slots = "
            f"{slots} < {num_experts} per layer. Use >= {nodes} nodes, or slots_per_node >= "
            f"{-(-num_experts // num_nodes)}"
        )
    return min(min_replicas, num_nodes, slots // num_experts)

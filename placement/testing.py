"""Property tests for placement policies, your own included.

    from placement.testing import conformance
    conformance(my_policy)          # raises AssertionError with the scenario, or returns its count

Scenarios are drawn from an explicit seed. No test framework is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.errors import InfeasiblePlacementError
from placement.plan import Plan
from placement.policy import PlacementPolicy
from placement.request import Floats, PlacementRequest, feasible_floor

_MASK64 = (1 << 64) - 1
_SHAPES = ((4, 3, 4), (10, 6, 16), (3, 2, 3), (5, 4, 5), (6, 8, 8), (2, 16, 16), (7, 3, 10))


@dataclass(slots=True)
class Dice:
    """A small random generator with explicit state, so that every rank draws the same numbers.

    Source: Steele, Lea and Flood's splitmix64.
    """

    state: int

    def below(self, bound: int) -> int:
        """Return a random integer in [0, bound)."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK64
        x = self.state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
        return ((x ^ (x >> 31)) >> 11) * bound >> 53


def assert_valid(plan: Plan, request: PlacementRequest) -> None:
    """Assert that ``plan`` is a valid answer to ``request``: shapes, slots, floor, shares, homes.

    Raises:
        AssertionError: A property does not hold; the message says which.
    """
    per_rank = request.slots_per_node // request.ranks_per_node
    ranks = request.num_nodes * request.ranks_per_node
    slots = plan.expert_of_slot
    shape = (request.num_layers, ranks, per_rank)
    assert plan.node_ids == request.node_ids, f"members {plan.node_ids}, not {request.node_ids}"
    assert slots.shape == shape, f"slots of shape {slots.shape}, not {shape}"
    assert slots.min() >= -1 and slots.max() < request.num_experts, "an expert id out of range"
    held = np.where(slots >= 0, slots, request.num_experts + np.arange(per_rank))
    assert (np.diff(held, axis=2) > 0).all(), "slots are not ascending, then empty, in a rank"
    floor = feasible_floor(
        num_experts=request.num_experts,
        num_nodes=request.num_nodes,
        slots_per_node=request.slots_per_node,
        min_replicas=request.min_replicas,
    )
    real = int(plan.replicas.min())
    assert plan.floor == real, f"the plan says floor {plan.floor}; it is {real}"
    assert real >= floor, f"an expert is on {real} nodes; {floor} were feasible"
    _assert_shares(plan, request)


def _assert_shares(plan: Plan, request: PlacementRequest) -> None:
    shares = plan.shares
    assert (shares >= 0).all(), "a share is negative"
    assert np.abs(shares.sum(2) - 1.0).max() < 1e-9, "the shares of an expert do not add up to 1"
    holds = np.zeros(shares.shape, dtype=np.bool_)
    layer, rank, slot = np.nonzero(plan.expert_of_slot >= 0)
    holds[layer, plan.expert_of_slot[layer, rank, slot], rank] = True
    assert (shares[~holds] == 0).all(), "a rank has a share of an expert that it does not hold"
    by_node = holds.reshape(*holds.shape[:2], request.num_nodes, request.ranks_per_node).sum(3)
    assert by_node.max() <= 1, "a node holds an expert twice"
    rows, experts = np.indices(plan.home.shape)
    assert holds[rows, experts, plan.home].all(), "a home does not hold its expert"


def conformance(policy: PlacementPolicy, *, seed: int = 0, rounds: int = 6) -> int:
    """Test a policy on starts, losses, joins, drifting loads and impossible requests.

    Args:
        policy: Called as ``policy(request, previous=..., lost=...)``.
        seed: Seed of the random scenarios.
        rounds: Plans per cluster shape; nodes change between two plans.

    Returns:
        The number of plans that were checked.

    Raises:
        AssertionError: The policy broke a rule; the message names the scenario.
    """
    dice = Dice(seed)
    checked = 0
    for nodes, slots, experts in _SHAPES:
        for per_node in (1, 2) if slots % 2 == 0 else (1,):
            checked += _life(policy, dice, (nodes, slots, experts, per_node), rounds)
    _assert_refuses(policy)
    return checked


def _life(
    policy: PlacementPolicy, dice: Dice, shape: tuple[int, int, int, int], rounds: int
) -> int:
    nodes, slots, experts, per_node = shape
    members = list(range(nodes))
    previous: Plan | None = None
    fresh = nodes
    lost: frozenset[int] = frozenset()
    load = _load(dice, 1 + dice.below(3), experts)
    racks = dice.below(2)
    for step in range(rounds):
        request = PlacementRequest(
            load=load,
            num_nodes=len(members),
            slots_per_node=slots,
            min_replicas=1 + dice.below(3),
            ranks_per_node=per_node,
            node_ids=tuple(members),
            domains=tuple(m % 3 for m in members) if racks else (),
            hazards=tuple((1 + m % 5) / 10 for m in members) if racks else (),
        )
        name = f"{len(members)} nodes x {slots} slots, {experts} experts, step {step}, lost {lost}"
        previous = _checked(policy, request, previous, lost, name)
        if dice.below(2) and (len(members) - 1) * slots >= experts:
            gone = members.pop(dice.below(len(members)))
            lost = frozenset({gone})
        else:
            lost = frozenset()
            members.append(fresh)
            fresh += 1
        if dice.below(2):
            load = load * (0.5 + np.array([dice.below(100) / 100 for _ in range(experts)]))
    return rounds


def _checked(
    policy: PlacementPolicy,
    request: PlacementRequest,
    previous: Plan | None,
    lost: frozenset[int],
    name: str,
) -> Plan:
    before = previous.digest if previous is not None else ""
    plan = policy(request, previous=previous, lost=lost)
    again = policy(request, previous=previous, lost=lost)
    assert plan.digest == again.digest, f"{name}: two calls gave two plans"
    assert previous is None or previous.digest == before, f"{name}: the previous plan was changed"
    try:
        assert_valid(plan, request)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    return plan


def _assert_refuses(policy: PlacementPolicy) -> None:
    request = PlacementRequest(load=[1.0] * 7, num_nodes=2, slots_per_node=3, min_replicas=1)
    try:
        policy(request, previous=None, lost=frozenset())
    except InfeasiblePlacementError:
        return
    raise AssertionError("7 experts on 2 nodes x 3 slots: wanted InfeasiblePlacementError")


def _load(dice: Dice, layers: int, experts: int) -> Floats:
    kind = dice.below(3)
    rows = np.array(
        [[dice.below(1000) for _ in range(experts)] for _ in range(layers)], dtype=float
    )
    if kind == 0:
        return np.ones((layers, experts))
    return rows if kind == 1 else rows**3

"""Builds the request to the placement policy and the events about its plan (rule 22). PURE."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.control.cluster.state import Control
from lazarus.control.cluster.transition import Transition
from lazarus.control.messages import Aligned
from lazarus.control.plans.verdict import SlotMemory, slots_for
from lazarus.control.ports import Publish
from placement import PlacementRequest, Plan, replan

_GRADIENT_SHARE = 1 / 3  # gradient over an image (weight and two moments)
_MOST_LISTED = 20_000  # larger plans are published without their slots


def plan_for(state: Control, transition: Transition) -> Plan:
    """The plan for the next members: the function F of rule 22.

    The plan depends on base plan, load history, members and configuration only.

    Raises:
        InfeasiblePlacementError: There are fewer slots than experts.
    """
    aligned = next(iter(transition.aligned.values()))
    nodes, config = transition.next_nodes, state.config
    slots = slots_for(
        num_nodes=len(nodes),
        num_experts=aligned.num_experts,
        configured=config.slots_per_node,
        started_nodes=config.nodes,
        min_replicas=config.min_replicas,
        spare_losses=config.spare_losses,
        ranks_per_node=config.ranks_per_node,
        memory=_memory(state, nodes, aligned),
    )
    request = request_for(state, load=history_of(aligned)[0], nodes=nodes, slots=slots)
    base = state.standing.base_plan
    gone = frozenset(base.node_ids) - set(nodes) if base else frozenset()
    if transition.reason == "rebalance" and config.placement is replan:
        return replan(request, previous=base, lost=gone, rebalance=True)
    return config.placement(request, previous=base, lost=gone)


def request_for(
    state: Control, *, load: NDArray[np.float64], nodes: tuple[int, ...], slots: int
) -> PlacementRequest:
    """The request to a placement policy.

    Args:
        load: Smoothed routed copies of each expert, float64 [L, E].
        nodes: Members by serial, ascending.
        slots: Slots of each node, in one layer.
    """
    config = state.config
    return PlacementRequest(
        load=load,
        num_nodes=len(nodes),
        slots_per_node=slots,
        min_replicas=min(config.min_replicas, len(nodes)),
        ranks_per_node=config.ranks_per_node,
        node_ids=nodes,
        domains=_domains(state, nodes) if config.plans_by_zone else (),
        resilience_weight=config.resilience_weight,
        solver=config.solver,
        solver_limit_s=config.plan_limit_s,
    )


def history_of(body: Aligned) -> NDArray[np.float64]:
    """The load history at the aligned step, float64 [3, L, E]."""
    shape = (3, body.num_layers, body.num_experts)
    return np.frombuffer(body.history, dtype="<f8").reshape(shape)


def _domains(state: Control, nodes: tuple[int, ...]) -> tuple[str, ...]:
    """The failure domain of each node; empty if no node names a zone.

    A node without a zone gets a domain of its own.
    """
    zones = [state.roster.nodes[node].zone for node in nodes]
    if not any(zones):
        return ()
    return tuple(zone or f"node {node}" for zone, node in zip(zones, nodes, strict=True))


def _memory(state: Control, nodes: tuple[int, ...], aligned: Aligned) -> SlotMemory | None:
    """Memory per slot and per node; None if a node does not know its memory."""
    least = min(state.roster.nodes[node].memory_bytes for node in nodes)
    if least <= 0 or not aligned.expert_bytes:
        return None
    room = state.config.memory_fraction * least
    dense = node_bytes(aligned, slots=0, ranks=state.config.ranks_per_node)
    slot = node_bytes(aligned, slots=1, ranks=0)
    return SlotMemory(per_slot=slot, per_node=room - dense, whole_node=least)


def node_bytes(aligned: Aligned, *, slots: int, ranks: int) -> float:
    """Bytes of a node's state with its gradients: the dense state of its ranks, and its slots."""
    experts = slots * aligned.expert_bytes * aligned.num_layers
    return (1 + _GRADIENT_SHARE) * (ranks * aligned.dense_bytes + experts)


def adoption(
    state: Control, transition: Transition, plan: Plan, *, at_s: float
) -> tuple[Publish, ...]:
    """Events for a newly adopted plan, and for a user's policy that was not followed."""
    asked = (("placement.policy", plan.fallback), ("recovery.policy", transition.refused))
    refused = (
        Publish(
            t=at_s,
            event="plan_fallback",
            fields={"generation": state.resumed, "reason": f"{key}: {reason}"},
        )
        for key, reason in asked
        if reason
    )
    return *refused, Publish(t=at_s, event="plan_adopted", fields=_plan_fields(state, plan))


def _plan_fields(state: Control, plan: Plan) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "generation": state.resumed,
        "digest": plan.digest,
        "method": plan.method,
        "floor": plan.floor,
        "requested_floor": state.config.min_replicas,
        "nodes": list(plan.node_ids),
        "slots_per_node": plan.slots_per_node,
        "notes": list(plan.notes),
    }
    if plan.expert_of_slot.size <= _MOST_LISTED:
        listed = plan.expert_of_slot.tolist()
        fields["experts_of_rank"] = [
            [[e for e in slots if e >= 0] for slots in ranks] for ranks in listed
        ]
    return fields

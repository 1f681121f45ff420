"""What a plan is asked for, and what the record says of it (rule 22). PURE."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.control.cluster.state import Control, Transition
from lazarus.control.messages import Aligned
from lazarus.control.plans.verdict import SlotMemory, slots_for
from lazarus.control.ports import Publish
from placement import PlacementRequest, Plan, replan

_GRADIENT_SHARE = 1 / 3  # of a record: weight and two moments are kept, the gradient is as large
_MOST_LISTED = 20_000  # slots of a plan that the record lists one by one


def plan_for(state: Control, transition: Transition) -> Plan:
    """F of rule 22: base plan, load history, members, configuration; nothing else.

    Raises:
        InfeasiblePlacementError: Fewer slots than experts.
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
    base = state.base_plan
    gone = frozenset(base.node_ids) - set(nodes) if base else frozenset()
    if transition.reason == "rebalance" and config.placement is replan:
        return replan(request, previous=base, lost=gone, rebalance=True)
    return config.placement(request, previous=base, lost=gone)


def request_for(
    state: Control, *, load: NDArray[np.float64], nodes: tuple[int, ...], slots: int
) -> PlacementRequest:
    """What the run asks a placement policy.

    Args:
        load: Smoothed tokens of each expert, [L, E].
        nodes: Members by serial, ascending.
        slots: Of each node, in one layer.
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
    """The load history at the aligned step, [3, L, E]."""
    shape = (3, body.num_layers, body.num_experts)
    return np.frombuffer(body.history, dtype="<f8").reshape(shape)


def _domains(state: Control, nodes: tuple[int, ...]) -> tuple[str, ...]:
    """The zone of each node; one that names none stands alone. Nothing if nobody names one."""
    zones = [state.nodes[node].zone for node in nodes]
    if not any(zones):
        return ()
    return tuple(zone or f"node {node}" for zone, node in zip(zones, nodes, strict=True))


def _memory(state: Control, nodes: tuple[int, ...], aligned: Aligned) -> SlotMemory | None:
    """What slots cost in all layers and may fill; None where a node does not know its memory."""
    least = min(state.nodes[node].memory_bytes for node in nodes)
    if least <= 0 or not aligned.expert_bytes:
        return None
    room = state.config.memory_fraction * least
    dense = (1 + _GRADIENT_SHARE) * aligned.dense_bytes * state.config.ranks_per_node
    slot = (1 + _GRADIENT_SHARE) * aligned.expert_bytes * aligned.num_layers
    return SlotMemory(per_slot=slot, per_node=room - dense, whole_node=least)


def adoption(
    state: Control, transition: Transition, plan: Plan, *, at_s: float
) -> tuple[Publish, ...]:
    """What the record says of the plan that is in force from now on."""
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

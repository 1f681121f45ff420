"""Plans made elsewhere: read, checked and converted to a ``Plan``, so that they can be certified.

Shapes: L layers, E experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from placement.assignment.build import Draft, plan_of
from placement.balance.shares import node_factors
from placement.certificate import Certificate
from placement.errors import InvalidRequestError
from placement.plan import Plan
from placement.request import Bools, Floats, PlacementRequest

_TOLERANCE = 1e-6
_SCHEMA = 1
_MOST_EXPERTS = 1_000_000


def certified(
    data: Mapping[str, Any], *, load: Any = None, num_experts: int | None = None
) -> tuple[Plan, Callable[[Certificate], list[str]]]:
    """Read a plan in the format of ``lazarus plan --json``.

    Args:
        data: At least ``experts_of_node`` [L][N][...]; ``shares`` [L][E][N] are used if given. An
            expert twice on a node counts once; -1 is an empty slot.
        load: Tokens per expert, [L, E], from which shares and homes are made; equal when None.
        num_experts: Experts per layer. None: taken from ``replicas`` or ``shares`` in ``data``,
            else the largest expert id + 1.

    Returns:
        The plan, and a function that takes its certificate and returns a line for every claim in
        ``data`` (such as ``survival``) that is wrong.

    Raises:
        InvalidRequestError: ``data`` is not a plan; the message says where.
    """
    if data.get("schema", _SCHEMA) != _SCHEMA:
        raise InvalidRequestError(f"schema {data['schema']!r}; this certifies schema {_SCHEMA}")
    rows = data.get("experts_of_node")
    claimed = _survival_claims(data.get("survival"))
    experts = _num_experts(data, rows, num_experts)
    member = _member(rows, experts)
    request = PlacementRequest(
        load=np.ones(member.shape[:2]) if load is None else load,
        num_nodes=member.shape[2],
        slots_per_node=int(member.sum(1).max()),
        min_replicas=1,
    )
    if request.load.shape != member.shape[:2]:
        raise InvalidRequestError(
            f"the load has shape {list(request.load.shape)}, the plan {list(member.shape[:2])} "
            "layers and experts"
        )
    factor = node_factors(request.load, member)
    plan = plan_of(
        request, Draft(member=member, factor=factor, excess=0.0), template=(), method="foreign"
    )
    shares = _shares(data.get("shares"), member)
    if shares is not None:
        plan = _with_shares(plan, shares)
    return plan, lambda found: _false_claims(data, claimed, plan, found)


def _survival_claims(value: Any) -> dict[int, float]:
    """The claimed survival probabilities by number of lost nodes."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"survival is {value!r}; wanted an object such as {{'1': 1.0}}")
    for key, chance in value.items():
        known = str(key).isdecimal() and isinstance(chance, int | float)
        if not known or isinstance(chance, bool) or not 0.0 <= chance <= 1.0:
            raise InvalidRequestError(
                f"survival of {key!r} lost nodes is {chance!r}; wanted a whole number of nodes and "
                "a probability"
            )
    return {int(key): float(chance) for key, chance in value.items()}


def _num_experts(data: Mapping[str, Any], rows: Any, num_experts: int | None) -> int:
    if num_experts is not None:
        return num_experts
    for key in ("replicas", "shares"):
        value = data.get(key)
        if isinstance(value, list) and value and isinstance(value[0], list) and value[0]:
            return len(value[0])
    try:
        return 1 + max(int(e) for layer in rows for node in layer for e in node)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("experts_of_node is no list [L][N][...] of expert ids") from error


def _member(rows: Any, num_experts: int) -> Bools:
    if not isinstance(rows, list) or not rows or not all(isinstance(x, list) for x in rows):
        raise InvalidRequestError("experts_of_node is missing or no list [L][N][...]")
    lengths = sorted({len(layer) for layer in rows})
    if len(lengths) != 1 or lengths[0] == 0:
        raise InvalidRequestError(f"layers have different numbers of nodes: {lengths}")
    if num_experts > _MOST_EXPERTS:
        raise InvalidRequestError(
            f"{num_experts} experts in a layer; at most {_MOST_EXPERTS} are certified"
        )
    member = np.zeros((len(rows), num_experts, lengths[0]), dtype=np.bool_)
    for layer, nodes in enumerate(rows):
        for node, held in enumerate(nodes):
            if not isinstance(held, list):
                raise InvalidRequestError(f"layer {layer}, node {node} is no list of expert ids")
            for expert in held:
                if isinstance(expert, bool) or not isinstance(expert, int):
                    raise InvalidRequestError(
                        f"layer {layer}, node {node} holds {expert!r}, which is no expert id"
                    )
                if expert != -1 and not 0 <= expert < num_experts:
                    raise InvalidRequestError(
                        f"layer {layer}, node {node} holds expert {expert}; there are "
                        f"{num_experts}, from 0"
                    )
                if expert >= 0:
                    member[layer, expert, node] = True
    missing = np.argwhere(~member.any(2))
    if len(missing):
        layer, expert = (int(i) for i in missing[0])
        raise InvalidRequestError(
            f"layer {layer}, expert {expert} is on no node ({len(missing)} such experts): "
            "not a plan"
        )
    return member


def _shares(value: Any, member: Bools) -> Floats | None:
    if value is None:
        return None
    try:
        shares = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"shares are no numbers [L][E][N]: {error}") from error
    if shares.shape != member.shape:
        raise InvalidRequestError(
            f"shares have shape {list(shares.shape)}, the plan {list(member.shape)}"
        )
    if not (np.isfinite(shares).all() and (shares >= -_TOLERANCE).all()):
        raise InvalidRequestError("shares must be finite and >= 0")
    if (shares[~member] > _TOLERANCE).any():
        layer, expert, node = (int(i) for i in np.argwhere((shares > _TOLERANCE) & ~member)[0])
        raise InvalidRequestError(
            f"layer {layer}: node {node} serves {shares[layer, expert, node]:.3g} of expert "
            f"{expert}, which it does not hold"
        )
    off = np.abs(shares.sum(2) - 1.0)
    if off.max() > 1e-4:
        layer, expert = (int(i) for i in np.argwhere(off > 1e-4)[0])
        raise InvalidRequestError(
            f"shares of layer {layer}, expert {expert} add up to {shares[layer, expert].sum():.6g}"
        )
    return shares


def _with_shares(plan: Plan, shares: Floats) -> Plan:
    """The plan, which has one rank per node, with the given shares [L, E, N]."""
    layer = np.arange(plan.num_layers)[:, None, None]
    node = np.arange(plan.num_nodes)[None, :, None]
    slots = plan.expert_of_slot
    filled = np.where(slots >= 0, shares[layer, np.maximum(slots, 0), node], 0.0)
    return Plan(
        node_ids=plan.node_ids,
        ranks_per_node=1,
        slots_per_node=plan.slots_per_node,
        num_experts=plan.num_experts,
        expert_of_slot=slots,
        share_of_slot=filled,
        home=plan.home,
        block=plan.block,
        floor=plan.floor,
        requested_floor=plan.requested_floor,
        method=plan.method,
    )


def _false_claims(
    data: Mapping[str, Any], claimed: Mapping[int, float], plan: Plan, found: Certificate
) -> list[str]:
    """A line for every claim in ``data`` that the certificate contradicts."""
    wrong = []
    replicas = data.get("replicas")
    if replicas is not None and replicas != plan.replicas.tolist():
        wrong.append("replicas do not match experts_of_node")
    floor = data.get("min_distinct_nodes")
    if floor is not None and floor != found.min_distinct_nodes:
        wrong.append(f"min_distinct_nodes is {found.min_distinct_nodes}, not {floor!r}")
    ratio = data.get("max_over_mean")
    if ratio is not None and not (isinstance(ratio, int | float) and ratio >= 1 - _TOLERANCE):
        wrong.append(f"max_over_mean is never below 1, not {ratio!r}")
    for lost, value in claimed.items():
        if lost > plan.num_nodes:
            wrong.append(f"survival of {lost} losses: there are {plan.num_nodes} nodes")
            continue
        real = found.survival.get(lost)
        if real is None:
            continue  # more losses than the certificate covers
        if abs(real - value) > (_TOLERANCE if found.exact else 0.05):
            wrong.append(f"survival of {lost} losses is {real:.6f}, not {value}")
    return wrong

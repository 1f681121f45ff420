"""Baseline placements: MRO as the paper prints it, spread, compact and an EPLB-like packing.

A baseline plans every layer separately. Shapes: E experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from placement.assignment.build import draft_of, plan_of
from placement.balance.allocate import allocate_as_paper, allocate_replicas
from placement.plan import Plan
from placement.request import Bools, Floats, PlacementRequest, feasible_floor
from placement.templates.family import mro

BASELINES = ("mro", "spread", "compact", "eplb-like")


def baseline(name: str, request: PlacementRequest) -> Plan:
    """Return the plan of a baseline. Shares are computed as in the library's own plans.

    Args:
        name: One of ``BASELINES``.
        request: Loads, nodes and slots.

    Raises:
        ValueError: There is no baseline of that name.
        InfeasiblePlacementError: Experts do not fit.
    """
    makers: dict[str, Callable[[Floats, PlacementRequest, int], Bools]] = {
        "mro": _mro_as_printed,
        "spread": _spread,
        "compact": _compact,
        "eplb-like": _eplb_like,
    }
    if name not in makers:
        raise ValueError(f"baseline {name!r} is none of {BASELINES}")
    floor = feasible_floor(
        num_experts=request.num_experts,
        num_nodes=request.num_nodes,
        slots_per_node=request.slots_per_node,
        min_replicas=request.min_replicas,
    )
    member = np.stack([makers[name](load_E, request, floor) for load_E in request.load])
    return plan_of(request, draft_of(request, member), template=(), method=name)


def _paper_replicas(load_E: Floats, request: PlacementRequest, floor: int) -> list[int]:
    slots = request.num_nodes * request.slots_per_node
    counts = allocate_as_paper(load_E.tolist(), num_slots=slots, min_replicas=floor)
    return [min(r, request.num_nodes) for r in counts]


def _mro_as_printed(load_E: Floats, request: PlacementRequest, floor: int) -> Bools:
    """Maximum rank overlap on the paper's allocation; missing replicas go to free slots in turn.

    Source: Lazarus, section 4.1.
    """
    counts = _paper_replicas(load_E, request, floor)
    order = sorted(range(len(counts)), key=lambda e: (counts[e], load_E[e], e))
    blocks = mro(
        [counts[e] for e in order],
        num_nodes=request.num_nodes,
        slots_per_node=request.slots_per_node,
    )
    member = np.zeros((len(counts), request.num_nodes), dtype=np.bool_)
    rank = 0
    for nodes, width in blocks:
        for expert in order[rank : rank + width]:
            room = member.sum(0) < request.slots_per_node
            held = [n for n in nodes if room[n]] or [int(np.argmax(room))]
            member[expert, held] = True
        rank += width
    turn = 0
    for expert in order:
        for _ in range(request.num_nodes):
            if member[expert].sum() >= counts[expert]:
                break
            node = turn % request.num_nodes
            turn += 1
            if not member[expert, node] and member[:, node].sum() < request.slots_per_node:
                member[expert, node] = True
    return member


def _spread(load_E: Floats, request: PlacementRequest, floor: int) -> Bools:
    """Lay the replicas out over all nodes, round-robin."""
    counts = _paper_replicas(load_E, request, floor)
    member = np.zeros((len(counts), request.num_nodes), dtype=np.bool_)
    position = 0
    for expert in sorted(range(len(counts)), key=lambda e: (counts[e], load_E[e], e)):
        for _ in range(counts[expert]):
            member[expert, position % request.num_nodes] = True
            position += 1
    return member


def _compact(load_E: Floats, request: PlacementRequest, floor: int) -> Bools:
    """Fill node after node, so that replicas of an expert share a node where possible."""
    counts = list(
        allocate_as_paper(
            load_E.tolist(),
            num_slots=request.num_nodes * request.slots_per_node,
            min_replicas=floor,
        )
    )
    member = np.zeros((len(counts), request.num_nodes), dtype=np.bool_)
    position = 0
    for expert in sorted(range(len(counts)), key=lambda e: (counts[e], load_E[e], e)):
        for _ in range(counts[expert]):
            member[expert, position // request.slots_per_node] = True
            position += 1
    return member


def _eplb_like(load_E: Floats, request: PlacementRequest, floor: int) -> Bools:
    """Replicate by load alone, then pack the heaviest copy onto the least loaded node.

    Source: the idea of DeepSeek's expert-parallel load balancer; own code.
    """
    counts = allocate_replicas(
        load_E,
        num_slots=request.num_nodes * request.slots_per_node,
        min_replicas=1,
        max_replicas=request.num_nodes,
    )[0]
    copies = [(float(load_E[e]) / int(r), e) for e, r in enumerate(counts) for _ in range(int(r))]
    member = np.zeros((len(counts), request.num_nodes), dtype=np.bool_)
    load = [0.0] * request.num_nodes
    used = [0] * request.num_nodes
    for weight, expert in sorted(copies, key=lambda c: (-c[0], c[1])):
        free = [n for n in range(request.num_nodes) if used[n] < request.slots_per_node]
        fresh = [n for n in free if not member[expert, n]] or free
        node = min(fresh, key=lambda n: (load[n], n))
        member[expert, node] = True
        load[node] += weight
        used[node] += 1
    del floor
    return member

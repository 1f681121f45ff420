"""From a template and loads to a finished plan.

Shapes: L layers, E experts, N nodes, R ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.assignment.assign import fill, ranks_by_load
from placement.assignment.homes import choose_homes
from placement.balance.allocate import allocate_replicas
from placement.balance.level import ROUNDS, levelled
from placement.balance.shares import ROUNDS as ROUNDS_OF_SHARES
from placement.balance.shares import expert_sums, loads_of_nodes, max_over_mean, node_factors
from placement.plan import Plan
from placement.request import Bools, Floats, Ints, PlacementRequest
from placement.templates.template import Template

AnyInts = npt.NDArray[np.signedinteger[Any]]
LARGE = 2_000_000  # layers x experts x nodes above which fewer rounds are run
_TIGHT = 0.9  # fraction of slots taken by floors above which fill cannot level the nodes
_BETTER = 0.98  # mix experts if that lowers the busiest block's load to less than this part


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A placement with its shares, before it becomes a plan.

    Attributes:
        member: bool [L, E, N].
        factor: Share factor of each node, [L, N]; see ``shares.node_factors``.
        excess: max/mean node load, averaged over layers, minus 1.
    """

    member: Bools
    factor: Floats
    excess: float


def draft_of(request: PlacementRequest, member: Bools) -> Draft:
    """Compute shares and balance of a placement, bool [L, E, N]."""
    rounds = ROUNDS_OF_SHARES if member.size <= LARGE else ROUNDS_OF_SHARES // 2
    factor = node_factors(request.load, member, rounds=rounds)
    ratio_L = max_over_mean(loads_of_nodes(request.load, member, factor))
    return Draft(member=member, factor=factor, excess=float(ratio_L.mean()) - 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Templates as arrays: one row per layer, or a single row for all layers; B blocks, padded.

    Attributes:
        nodes: bool [L, B, N].
        widths: int [L, B]; 0 for padding.
    """

    nodes: Bools
    widths: Ints


def frame_of(templates: Sequence[Template], *, num_nodes: int) -> Frame:
    """Convert templates to arrays, one template per row."""
    blocks = max(len(t) for t in templates)
    nodes = np.zeros((len(templates), blocks, num_nodes), dtype=np.bool_)
    widths = np.zeros((len(templates), blocks), dtype=np.int32)
    for row, template in enumerate(templates):
        for block, (held, width) in enumerate(template):
            nodes[row, block, list(held)] = True
            widths[row, block] = width
    return Frame(nodes=nodes, widths=widths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Replicas assigned to nodes on a template.

    Attributes:
        member: bool [L, E, N].
        block: Block of each expert, int32 [L, E].
        ratio: Rough max/mean of each layer, [L]; None where the problem is large.
    """

    member: Bools
    block: Ints
    ratio: Floats | None


def place(request: PlacementRequest, template: Template) -> Placed:
    """Assign the replicas of all layers to nodes on ``template``."""
    frame = frame_of([template], num_nodes=request.num_nodes)
    return place_frame(request.load, frame, slots_per_node=request.slots_per_node)


def place_frame(
    load_LE: Floats, frame: Frame, *, slots_per_node: int, rounds: int = ROUNDS
) -> Placed:
    """Assign replicas for one template per row: core, allocation, fill and levelling."""
    num_layers, num_experts = load_LE.shape
    num_nodes = frame.nodes.shape[2]
    order = ranks_by_load(load_LE).astype(np.intp)
    size_LB = np.broadcast_to(frame.nodes.sum(2), (num_layers, frame.nodes.shape[1]))
    width_LB = np.broadcast_to(frame.widths, size_LB.shape)
    rank_LB = np.cumsum(width_LB, axis=1)
    # The block of a rank, as if blocks were filled in order: the first whose end lies beyond it.
    by_rank = (np.arange(num_experts)[None, :, None] >= rank_LB[:, None, :]).sum(2)
    floor_LE = np.empty((num_layers, num_experts), dtype=np.int32)
    np.put_along_axis(floor_LE, order, np.take_along_axis(size_LB, by_rank, 1), axis=1)
    tight_L = (size_LB * width_LB).sum(1) > _TIGHT * num_nodes * slots_per_node
    if tight_L.any():
        floor_LE[tight_L] = mixed_floors(
            load_LE[tight_L], floor_LE[tight_L], size_LB[tight_L], width_LB[tight_L], order[tight_L]
        )
    replicas = allocate_replicas(
        load_LE,
        num_slots=num_nodes * slots_per_node,
        min_replicas=floor_LE,
        max_replicas=num_nodes,
    )
    block_LE = level_blocks(load_LE / replicas, floor_LE, size_LB, width_LB, order)
    rows = np.arange(num_layers)[:, None] if len(frame.nodes) > 1 else np.zeros((1, 1), np.intp)
    core = frame.nodes[rows, block_LE]
    full = fill(load_LE, replicas, core, slots_per_node=slots_per_node)
    member, ratio_L = levelled(load_LE, full, core, slots_per_node=slots_per_node, rounds=rounds)
    return Placed(member=member, block=block_LE, ratio=ratio_L)


def mixed_floors(
    load_LE: Floats, floor_LE: Ints, size_LB: AnyInts, width_LB: AnyInts, order: AnyInts
) -> Ints:
    """Floors [L, E] after experts are dealt to blocks by load, in the layers where that helps.

    Survival does not depend on which expert is in which block. If floors take nearly all slots, a
    block of cold experts only would leave its nodes idle. Therefore each expert, hottest first,
    goes to the block whose load per node is least once the expert is counted.
    """
    rows_L = np.arange(len(load_LE))
    room = width_LB.copy()
    dealt = np.zeros(size_LB.shape)
    mixed = np.empty_like(floor_LE)
    size_of = np.maximum(size_LB, 1)
    for step in range(load_LE.shape[1] - 1, -1, -1):
        expert_L = order[:, step]
        with_it = (dealt + load_LE[rows_L, expert_L][:, None]) / size_of
        block_L = np.where(room > 0, with_it, np.inf).argmin(1)
        dealt[rows_L, block_L] += load_LE[rows_L, expert_L]
        room[rows_L, block_L] -= 1
        mixed[rows_L, expert_L] = size_LB[rows_L, block_L]
    better_L = _busiest(load_LE, mixed, size_LB, width_LB) < _BETTER * _busiest(
        load_LE, floor_LE, size_LB, width_LB
    )
    return np.where(better_L[:, None], mixed, floor_LE)


def _busiest(load_LE: Floats, floor_LE: Ints, size_LB: AnyInts, width_LB: AnyInts) -> Floats:
    """Largest load per node of any block, [L]; blocks of equal size share their load evenly."""
    worst_L = np.zeros(len(load_LE))
    for size in np.unique(floor_LE):
        nodes_L = size * ((size_LB == size) & (width_LB > 0)).sum(1)
        load_L = np.where(floor_LE == size, load_LE, 0.0).sum(1)
        worst_L = np.maximum(worst_L, load_L / np.maximum(nodes_L, 1))
    return worst_L


def level_blocks(
    weight_LE: Floats,
    floor_LE: Ints,
    size_LB: AnyInts,
    width_LB: AnyInts,
    order: AnyInts,
) -> Ints:
    """Return each expert's block, int32 [L, E], so that blocks of equal size have equal loads.

    Each expert, hottest first, goes to the lightest block of its size with a place left.
    """
    num_layers, num_experts = weight_LE.shape
    rows_L = np.arange(num_layers)
    room = width_LB.astype(np.float64)
    load = np.zeros(room.shape)
    block_LE = np.empty((num_layers, num_experts), dtype=np.int32)
    for step in range(num_experts - 1, -1, -1):
        expert_L = order[:, step]
        closed = (size_LB != floor_LE[rows_L, expert_L][:, None]) | (room <= 0)
        block_L = np.where(closed, np.inf, load).argmin(1)
        block_LE[rows_L, expert_L] = block_L
        load[rows_L, block_L] += weight_LE[rows_L, expert_L]
        room[rows_L, block_L] -= 1
    return block_LE


def slots_of(member: Bools, weight_LE: Floats, *, ranks_per_node: int, slots_per_rank: int) -> Ints:
    """Distribute each node's experts over its ranks, evenly by load; int32 [L, R, S], -1 empty."""
    num_layers, _, num_nodes = member.shape
    slots = np.full((num_layers, num_nodes * ranks_per_node, slots_per_rank), -1, dtype=np.int32)
    if ranks_per_node == 1:
        row_M, node = np.divmod(np.flatnonzero(member), num_nodes)
        layer, expert = np.divmod(row_M, member.shape[1])
        order = np.argsort(layer * num_nodes + node, kind="stable")
        layer, node, expert = layer[order], node[order], expert[order]
        flat = layer * num_nodes + node
        counts = np.bincount(flat, minlength=num_layers * num_nodes)
        slots[layer, node, np.arange(len(flat)) - (np.cumsum(counts) - counts)[flat]] = expert
        return slots
    for row in range(num_layers * num_nodes):
        at_layer, at_node = divmod(row, num_nodes)
        ranks: list[list[int]] = [[] for _ in range(ranks_per_node)]
        held = np.flatnonzero(member[at_layer, :, at_node]).tolist()
        add_to_ranks(ranks, held, weight_E=weight_LE[at_layer], room=slots_per_rank)
        for r, experts in enumerate(ranks):
            slots[at_layer, at_node * ranks_per_node + r, : len(experts)] = sorted(experts)
    return slots


def add_to_ranks(
    ranks: list[list[int]], experts: Sequence[int], *, weight_E: Floats, room: int
) -> None:
    """Append experts, hottest first, to the least loaded list of ``ranks`` with a free slot."""
    load = [float(sum(weight_E[e] for e in held)) for held in ranks]
    for expert in sorted(experts, key=lambda e: (-weight_E[e], e)):
        free = [r for r in range(len(ranks)) if len(ranks[r]) < room]
        best = min(free, key=lambda r: (load[r], len(ranks[r]), r))
        ranks[best].append(expert)
        load[best] += float(weight_E[expert])


def plan_of(
    request: PlacementRequest,
    draft: Draft,
    *,
    template: Template,
    method: str,
    notes: tuple[str, ...] = (),
    block: Ints | None = None,
    expert_of_slot: Ints | None = None,
) -> Plan:
    """Make the plan of a draft; ``expert_of_slot`` [L, R, S] fixes the slots if given."""
    if block is None:
        block = np.full(request.load.shape, -1, dtype=np.int32)
    replicas = draft.member.sum(2, dtype=np.int32)
    if expert_of_slot is None:
        expert_of_slot = slots_of(
            draft.member,
            request.load / replicas,
            ranks_per_node=request.ranks_per_node,
            slots_per_rank=request.slots_per_node // request.ranks_per_node,
        )
    return Plan(
        node_ids=request.node_ids,
        ranks_per_node=request.ranks_per_node,
        slots_per_node=request.slots_per_node,
        num_experts=request.num_experts,
        expert_of_slot=expert_of_slot,
        share_of_slot=slot_shares(expert_of_slot, draft, ranks_per_node=request.ranks_per_node),
        home=choose_homes(request.load, expert_of_slot),
        template=template,
        block=block,
        floor=int(replicas.min()),
        requested_floor=request.min_replicas,
        method=method,
        notes=notes,
    )


def slot_shares(expert_of_slot: Ints, draft: Draft, *, ranks_per_node: int) -> Floats:
    """Return each slot's share of its expert's tokens, float64 [L, R, S]; 0 for an empty slot."""
    layers, ranks, _ = expert_of_slot.shape
    sums_LE = expert_sums(draft.member, draft.factor)
    layer = np.arange(layers)[:, None, None]
    factor = draft.factor[:, np.arange(ranks) // ranks_per_node, None]
    shares = factor / sums_LE[layer, np.maximum(expert_of_slot, 0)]
    filled: Floats = np.where(expert_of_slot >= 0, shares, 0.0)
    return filled

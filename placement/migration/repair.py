"""Repair in place: the next plan after losses, joins or drifting loads, with few moves.

Shapes: L layers, E experts, N nodes (new members), B blocks.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from placement.assignment.assign import fill
from placement.assignment.build import add_to_ranks, draft_of, plan_of, slots_of
from placement.balance.allocate import allocate_replicas
from placement.balance.level import ROUNDS, levelled
from placement.balance.shares import replicas_on_nodes
from placement.migration.cores import (
    Risk,
    core_member,
    held_by_block,
    no_risk,
    repaired_blocks,
    unconfined_blocks,
)
from placement.migration.pairs import cheapest_pairs
from placement.plan import Plan
from placement.request import Bools, Floats, Ints, PlacementRequest
from placement.templates.order import block_risk, improved_order, on_nodes
from placement.templates.template import Template, block_of_rank

_JOIN_ROUNDS = 3


def surviving(previous: Plan, request: PlacementRequest) -> tuple[Bools, Ints]:
    """Return the surviving replicas, bool [L, E, N], and each node's old position (-1: joiner)."""
    before, now = np.array(previous.node_ids), np.array(request.node_ids)  # both ascending
    at = np.minimum(np.searchsorted(before, now), len(before) - 1)
    origin = np.where(before[at] == now, at, -1).astype(np.int32)
    position = np.full(previous.num_nodes, -1, dtype=np.intp)  # of the old nodes in the new request
    position[origin[origin >= 0]] = np.flatnonzero(origin >= 0)
    row_M, node_M = np.divmod(np.flatnonzero(previous.node_member), previous.num_nodes)
    node_M = position[node_M]
    kept_M = node_M >= 0
    shape = (previous.num_layers, previous.num_experts, request.num_nodes)
    member = np.zeros(shape, dtype=np.bool_)
    member.reshape(-1)[(row_M * request.num_nodes + node_M)[kept_M]] = True
    return member, origin


def same_shape(previous: Plan, request: PlacementRequest) -> bool:
    """Return whether slots, ranks, layers and experts are unchanged, so that replicas can stay."""
    return (
        previous.num_layers == request.num_layers
        and previous.num_experts == request.num_experts
        and previous.ranks_per_node == request.ranks_per_node
        and previous.slots_per_node == request.slots_per_node
    )


def repaired_template(
    previous: Plan, request: PlacementRequest, *, member: Bools, origin: Ints, floor: int
) -> Template | None:
    """Return the previous template on the nodes of the request, or None if it cannot be kept.

    Blocks that lost nodes are refilled (``cores.repaired_blocks``), taking racks and hazards into
    account. A block that lies within a single rack then exchanges a node with another rack.

    Args:
        previous: The plan in force until now.
        request: Loads, nodes and slots after the change.
        member: Surviving replicas, bool [L, E, N].
        origin: Old position of each node, -1 for a joiner, [N].
        floor: Fewest nodes of a block.
    """
    if not previous.template:
        return None
    new_position = {old: new for new, old in enumerate(origin.tolist()) if old >= 0}
    old = [
        (tuple([new_position[n] for n in nodes if n in new_position]), width)
        for nodes, width in previous.template
    ]
    held_BN = held_by_block(member, previous.block, len(old))
    joiners = np.flatnonzero(origin < 0).tolist()
    wanted = min(len(nodes) for nodes, _ in previous.template)
    risk: Risk = no_risk
    if len(request.domains) or len(request.hazards):
        risk = partial(block_risk, domains=request.domains, hazards=request.hazards)
    for least in sorted({max(wanted, floor), floor}, reverse=True):
        blocks = repaired_blocks(
            old,
            joiners=joiners,
            held_BN=held_BN,
            slots_per_node=request.slots_per_node,
            floor=least,
            risk=risk,
        )
        if blocks is not None:
            return unconfined_blocks(
                blocks,
                domain_of_node=request.domains,
                held_BN=held_BN,
                slots_per_node=request.slots_per_node,
            )
    return None


def relabelled(
    template: Template, member: Bools, block_LE: Ints, request: PlacementRequest
) -> tuple[Template, Ints]:
    """Fit a new template to the replicas that exist, so that few of them move.

    Nodes are matched to template positions by an optimal assignment over all layers. If nodes
    differ in rack or hazard, pairs of nodes are then swapped while that lowers the blocks' risk.
    Finally, experts are assigned to blocks layer by layer.

    Args:
        template: The new template.
        member: Surviving replicas, bool [L, E, N].
        block_LE: Block of each expert by load.
        request: Nodes with racks and hazards.

    Returns:
        The template with its nodes permuted, and the block of each expert, int32 [L, E].
    """
    num_nodes = member.shape[2]
    held_BN = held_by_block(member, block_LE, len(template))
    gain = np.zeros((num_nodes, num_nodes))
    for block, (nodes, _) in enumerate(template):
        gain[list(nodes)] += held_BN[block]
    position, node = cheapest_pairs(-gain)
    order = [int(n) for _, n in sorted(zip(position.tolist(), node.tolist(), strict=True))]
    moved = on_nodes(template, improved_order(template, order, request.domains, request.hazards))
    return moved, _experts_in_place(moved, member, block_LE)


def _experts_in_place(template: Template, member: Bools, block_LE: Ints) -> Ints:
    """Assign experts to blocks so that few core replicas move; ties prefer the block by load."""
    num_layers, _, num_nodes = member.shape
    nodes_BN = np.zeros((len(template), num_nodes))
    for row, (nodes, _) in enumerate(template):
        nodes_BN[row, list(nodes)] = 1.0
    kept = np.einsum("len,bn->leb", member, nodes_BN)
    missing = nodes_BN.sum(1) - kept
    by_rank = block_of_rank(template)
    settled = np.empty_like(block_LE)
    for layer in range(num_layers):
        cost = missing[layer][:, by_rank]
        cost = cost + 0.01 * np.abs(by_rank[None, :] - block_LE[layer][:, None])
        expert, place = cheapest_pairs(cost)
        settled[layer, expert] = by_rank[place]
    return settled


def in_place(
    previous: Plan,
    request: PlacementRequest,
    *,
    template: Template,
    block_LE: Ints,
    member: Bools,
    origin: Ints,
    method: str,
    notes: tuple[str, ...],
    rebalance: bool,
) -> Plan:
    """Make the plan on ``template`` that keeps as many of the surviving replicas as possible."""
    core = core_member(template, block_LE, num_nodes=request.num_nodes)
    kept = evicted(member, core, load_LE=request.load, slots_per_node=request.slots_per_node)
    floors = kept.sum(2, dtype=np.int32)
    total = request.num_nodes * request.slots_per_node
    target = allocate_replicas(
        request.load, num_slots=total, min_replicas=floors, max_replicas=request.num_nodes
    )
    full = fill(request.load, target, kept, slots_per_node=request.slots_per_node)
    joiners = origin < 0
    if rebalance or joiners.any():
        # Joiners receive all their slots anyway; other nodes' fill moves only in a rebalance.
        full, _ = levelled(
            request.load,
            full,
            core,
            slots_per_node=request.slots_per_node,
            targets=None if rebalance else joiners,
            rounds=ROUNDS if rebalance else _JOIN_ROUNDS,
        )
    draft = draft_of(request, full)
    slots = settled_slots(previous, request, full, origin=origin)
    return plan_of(
        request,
        draft,
        template=template,
        block=block_LE,
        method=method,
        notes=notes,
        expert_of_slot=slots,
    )


def evicted(member: Bools, core: Bools, *, load_LE: Floats, slots_per_node: int) -> Bools:
    """Return ``member | core`` with fill evicted from nodes that exceed their slots.

    An overfull node drops the expert whose other replicas then have the least load each.
    """
    num_layers = member.shape[0]
    rows_L = np.arange(num_layers)
    both = member | core
    over = replicas_on_nodes(both) - slots_per_node
    if not (over > 0).any():
        return both
    count = both.sum(2)
    for node in np.flatnonzero((over > 0).any(0)):
        while (over[:, node] > 0).any():
            loose = both[:, :, node] & ~core[:, :, node]
            after = np.where(loose, load_LE / np.maximum(count - 1, 1e-9), np.inf)
            expert_L = after.argmin(1)
            go_L = over[:, node] > 0
            both[rows_L[go_L], expert_L[go_L], node] = False
            count[rows_L[go_L], expert_L[go_L]] -= 1
            over[:, node] -= go_L
    return both


def settled_slots(
    previous: Plan, request: PlacementRequest, member: Bools, *, origin: Ints
) -> Ints:
    """Assign replicas to slots so that surviving replicas keep their rank; int32 [L, R, S]."""
    per_node, per_rank = request.ranks_per_node, request.slots_per_node // request.ranks_per_node
    if per_node == 1:
        return slots_of(member, request.load, ranks_per_node=1, slots_per_rank=per_rank)
    weight_LE = request.load / member.sum(2)
    old = previous.expert_of_slot
    shape = (request.num_layers, request.num_nodes * per_node, per_rank)
    slots = np.full(shape, -1, dtype=np.int32)
    for layer in range(request.num_layers):
        for node in range(request.num_nodes):
            ranks: list[list[int]] = [[] for _ in range(per_node)]
            wanted = set(np.flatnonzero(member[layer, :, node]).tolist())
            if origin[node] >= 0:
                for r in range(per_node):
                    row = old[layer, int(origin[node]) * per_node + r]
                    ranks[r] = [int(e) for e in row if e >= 0 and int(e) in wanted]
                    wanted.difference_update(ranks[r])
            add_to_ranks(ranks, sorted(wanted), weight_E=weight_LE[layer], room=per_rank)
            for r, experts in enumerate(ranks):
                slots[layer, node * per_node + r, : len(experts)] = sorted(experts)
    return slots

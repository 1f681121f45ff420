"""Assign replicas to nodes, given the core node sets and replica counts.

Shapes: L layers, E experts, N nodes. ``member`` is bool [L, E, N].
"""

from __future__ import annotations

import numpy as np

from placement.balance.shares import replicas_on_nodes
from placement.request import Bools, Floats, Ints

_SMALL = 4096


def ranks_by_load(load_LE: Floats) -> Ints:
    """Return the experts of every layer from coldest to hottest, int32 [L, E]; ties by id."""
    order: Ints = np.argsort(load_LE, axis=1, kind="stable").astype(np.int32)
    return order


def fill(load_LE: Floats, replicas_LE: Ints, member: Bools, *, slots_per_node: int) -> Bools:
    """Add replicas to the core until every expert has its number, hottest expert first.

    New replicas go to the least loaded nodes that have a free slot and do not hold the expert
    yet. A replica without such a node is dropped. Free slots that remain then go to the experts
    with the largest load per replica.

    Args:
        load_LE: Tokens per expert, [L, E].
        replicas_LE: Replicas wanted, [L, E]; an expert that has more already keeps them.
        member: The core, bool [L, E, N]; not changed.
        slots_per_node: Slots per node and layer.

    Returns:
        Core and fill together, bool [L, E, N].
    """
    member = member.copy()
    rows_L = np.arange(len(member))
    weight_LE = load_LE / np.maximum(replicas_LE, 1)
    node_load = np.einsum("le,len->ln", weight_LE, member)
    room = slots_per_node - replicas_on_nodes(member)
    missing = replicas_LE - member.sum(2)
    order = np.argsort(-load_LE, axis=1, kind="stable")
    wanting = (np.take_along_axis(missing, order, 1) > 0).any(0)
    for step in np.flatnonzero(wanting).tolist():
        expert_L = order[:, step]
        need_L = missing[rows_L, expert_L]
        chosen = _least_loaded(
            np.where(member[rows_L, expert_L] | (room <= 0), np.inf, node_load), need_L
        )
        member[rows_L, expert_L] |= chosen
        room -= chosen
        node_load += chosen * weight_LE[rows_L, expert_L][:, None]
    return _use_leftovers(load_LE, member, room)


def _least_loaded(key_LN: Floats, need_L: Ints) -> Bools:
    """The ``need_L`` nodes with the smallest finite key of each row, ties to the lower node."""
    num_layers, num_nodes = key_LN.shape
    if key_LN.size <= _SMALL:
        order = np.argsort(key_LN, axis=1, kind="stable")
    else:
        # A tiny offset per node breaks ties, so that a partial sort, which is faster, suffices.
        hair = 1e-12 * max(float(key_LN[key_LN < np.inf].max(initial=1.0)), 1e-300)
        key_LN = key_LN + hair * np.arange(num_nodes)
        most = min(max(int(need_L.max()), 1), num_nodes)
        part = np.argpartition(key_LN, most - 1, axis=1)[:, :most]
        inner = np.argsort(np.take_along_axis(key_LN, part, 1), axis=1)
        order = np.take_along_axis(part, inner, 1)
    picked = (order + np.arange(num_layers)[:, None] * num_nodes)[
        np.arange(order.shape[1]) < need_L[:, None]
    ]
    chosen = np.zeros(key_LN.size, dtype=np.bool_)
    chosen[picked] = np.take(key_LN, picked) < np.inf
    return chosen.reshape(num_layers, num_nodes)


def _use_leftovers(load_LE: Floats, member: Bools, room: Ints) -> Bools:
    """Give each free slot to the expert with the most load per replica that its node lacks."""
    most = int(room.sum(1).max(initial=0))
    if most <= 0:
        return member
    rows_L = np.arange(len(load_LE))
    counts = member.sum(2)
    for _ in range(most):
        open_LEN: Bools = ~member & (room > 0)[:, None, :]
        can_LE: Bools = np.any(open_LEN, axis=2)
        if not can_LE.any():
            break
        ratio = np.where(can_LE, (load_LE + 1e-300) / counts, -1.0)
        expert_L = ratio.argmax(1)
        go_L = can_LE[rows_L, expert_L]
        use = np.einsum("le,len->ln", load_LE / counts, member)
        node_L = np.where(open_LEN[rows_L, expert_L], use, np.inf).argmin(1)
        layer, expert, node = rows_L[go_L], expert_L[go_L], node_L[go_L]
        member[layer, expert, node] = True
        counts[layer, expert] += 1
        room[layer, node] -= 1
    return member

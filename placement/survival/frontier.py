"""Exact survival of arbitrary node sets by dynamic programming over a frontier of open sets.

Nodes are processed one by one. A state is the bitmask of the sets that have begun and whose nodes
are all dead so far. Its value counts the dead sets by size, as the coefficients of a polynomial
packed into one integer. A branch ends when a set is complete and entirely dead.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.survival.bitmasks import nodes_of

MAX_STATES = 100_000


def node_order(masks: Sequence[int]) -> tuple[int, ...]:
    """Order the nodes of the sets so that few sets are open at a time (greedy)."""
    left = list(masks)
    opened = 0
    union = 0
    for mask in masks:
        union |= mask
    nodes = set(nodes_of(union))
    order = []
    at = {n: [i for i, m in enumerate(masks) if m >> n & 1] for n in nodes}
    touched = [False] * len(masks)
    while nodes:

        def cost(node: int) -> tuple[int, int]:
            fresh = sum(not touched[i] for i in at[node])
            closed = sum(left[i].bit_count() == 1 for i in at[node])
            return fresh - closed, node

        best = min(nodes, key=cost)
        nodes.discard(best)
        order.append(best)
        for i in at[best]:
            touched[i] = True
            left[i] &= ~(1 << best)
    del opened
    return tuple(order)


def _steps(masks: Sequence[int], order: Sequence[int]) -> list[tuple[int, int, int]]:
    """For each node: bitmasks of its sets, of sets that begin here, and of sets that end here."""
    position = {n: i for i, n in enumerate(order)}
    sets_at = [0] * len(order)
    opens = [0] * len(order)
    closes = [0] * len(order)
    for index, mask in enumerate(masks):
        places = sorted(position[n] for n in nodes_of(mask))
        for place in places:
            sets_at[place] |= 1 << index
        opens[places[0]] |= 1 << index
        closes[places[-1]] |= 1 << index
    return list(zip(sets_at, opens, closes, strict=True))


def frontier_counts(
    masks: Sequence[int], *, num_nodes: int, max_states: int = MAX_STATES
) -> tuple[int, ...] | None:
    """Count, for k = 0..N, the sets of k dead nodes that contain no node set.

    Returns None if more than ``max_states`` states would be needed.
    """
    order = node_order(masks)
    width = num_nodes + 1  # bits per coefficient; none exceeds 2**num_nodes
    states: dict[int, int] = {0: 1}
    for at, opens, closes in _steps(masks, order):
        following: dict[int, int] = {}
        for dead, value in states.items():
            alive_state = dead & ~at
            following[alive_state] = following.get(alive_state, 0) + value
            dead_state = dead | opens
            if not dead_state & closes:
                following[dead_state] = following.get(dead_state, 0) + (value << width)
        states = following
        if len(states) > max_states:
            return None
    total = sum(states.values())
    for _ in range(num_nodes - len(order)):
        total += total << width
    low = (1 << width) - 1
    return tuple(total >> width * k & low for k in range(num_nodes + 1))


def frontier_probability(masks: Sequence[int], *, hazards: Sequence[float]) -> float | None:
    """Return P(no node set is dead) if node i dies independently with probability ``hazards[i]``.

    Returns None if more than ``MAX_STATES`` states would be needed.
    """
    order = node_order(masks)
    states: dict[int, float] = {0: 1.0}
    for node, (at, opens, closes) in zip(order, _steps(masks, order), strict=True):
        following: dict[int, float] = {}
        hazard = hazards[node]
        for dead, value in states.items():
            alive_state = dead & ~at
            following[alive_state] = following.get(alive_state, 0.0) + value * (1.0 - hazard)
            dead_state = dead | opens
            if not dead_state & closes:
                following[dead_state] = following.get(dead_state, 0.0) + value * hazard
        states = following
        if len(states) > MAX_STATES:
            return None
    return sum(states.values())

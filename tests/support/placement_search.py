"""Bounded local search on core node sets, for use without time pressure.

Four moves: swap two replicas between nodes; move a replica to a free slot; add a replica in a free
slot; evict (an expert takes a slot of another expert, whose replica moves to the first expert's old
node or is dropped). The first improvement is accepted, and up to 20 consecutive moves without
change of score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from placement.survival.bitmasks import minimal_masks
from placement.survival.resilience import survival
from placement.survival.truth import MAX_NODES, surviving_counts
from placement.templates.family import Candidate, family
from placement.templates.template import Template, masks
from placement.testing import Dice

_LEVEL_MOVES = 20


@dataclass(slots=True)
class _State:
    sets: list[int]
    used: list[int]


def summed_survival(template: Template, *, num_nodes: int) -> float:
    """Return the sum over k of P(survive k losses): the score that ranks candidates."""
    return sum(survival(masks(template), num_nodes=num_nodes).probability)


def best_of_family(
    replicas: Sequence[int], *, num_nodes: int, slots_per_node: int, keep: int = 1
) -> tuple[Candidate, ...]:
    """Return the ``keep`` best candidates by summed survival, best first; ties in family order."""
    found = family(tuple(replicas), num_nodes=num_nodes, slots_per_node=slots_per_node)
    scored = [(-summed_survival(c.blocks, num_nodes=num_nodes), i) for i, c in enumerate(found)]
    return tuple(found[i] for _, i in sorted(scored)[:keep])


def searched(
    replicas: Sequence[int],
    *,
    num_nodes: int,
    slots_per_node: int,
    starts: int = 4,
    evaluations: int = 500,
    seed: int = 0,
) -> tuple[tuple[int, ...], float]:
    """Search for node sets with better survival, starting from the best candidates of ``family``.

    Args:
        replicas: Replica counts in ascending order, [E].
        num_nodes: Number of nodes, N <= 20.
        slots_per_node: Slots per node.
        starts: Number of candidates to start from.
        evaluations: Scored moves per start.
        seed: Seed of the moves.

    Returns:
        One node set (bitmask) per expert, and their summed survival, which is never below that of
        the best candidate.

    Raises:
        ValueError: More than 20 nodes; the score is computed by truth tables.
    """
    if num_nodes > MAX_NODES:
        raise ValueError(f"the search scores by truth table: {num_nodes} nodes > {MAX_NODES}")
    best: tuple[float, tuple[int, ...]] | None = None
    found = best_of_family(
        replicas, num_nodes=num_nodes, slots_per_node=slots_per_node, keep=starts
    )
    for index, candidate in enumerate(found):
        dice = Dice((seed << 8) + index)
        state = _start(candidate, replicas, num_nodes, slots_per_node)
        score = _climb(state, replicas, slots_per_node, dice, evaluations)
        if best is None or score > best[0] + 1e-12:
            best = (score, tuple(state.sets))
    assert best is not None, "the family is never empty"
    return best[1], best[0]


def _start(candidate: Candidate, replicas: Sequence[int], num_nodes: int, slots: int) -> _State:
    """The candidate's core plus fill: missing replicas go to the emptiest nodes."""
    sets = expanded(candidate.blocks)
    used = [sum(s >> n & 1 for s in sets) for n in range(num_nodes)]
    for expert, count in enumerate(replicas):
        for node in sorted(range(num_nodes), key=lambda n: (used[n], n)):
            if sets[expert].bit_count() >= count:
                break
            if used[node] < slots and not sets[expert] >> node & 1:
                sets[expert] |= 1 << node
                used[node] += 1
    return _State(sets=sets, used=used)


def expanded(blocks: Template) -> list[int]:
    """Return the node set of each expert as a bitmask."""
    return [m for m, (_, width) in zip(masks(blocks), blocks, strict=True) for _ in range(width)]


def score_of(sets: Sequence[int], *, num_nodes: int) -> float:
    """Return the sum over k of P(survive k losses)."""
    counts = surviving_counts(minimal_masks(sets), num_nodes=num_nodes)
    binomial, total = 1, 0.0
    for k, count in enumerate(counts):
        total += count / binomial
        binomial = binomial * (num_nodes - k) // (k + 1)
    return total


def _climb(
    state: _State, replicas: Sequence[int], slots: int, dice: Dice, evaluations: int
) -> float:
    num_nodes = len(state.used)
    score, level = score_of(state.sets, num_nodes=num_nodes), 0
    best, best_sets = score, list(state.sets)
    spent = tried = 0
    while spent < evaluations and tried < 20 * evaluations:
        tried += 1
        move = _propose(state, replicas, slots, dice)
        if move is None:
            continue
        spent += 1
        before = [(e, state.sets[e]) for e, _ in move]
        _apply(state, move)
        now = score_of(state.sets, num_nodes=num_nodes)
        if now > score + 1e-12:
            score, level = now, 0
            if score > best + 1e-12:
                best, best_sets = score, list(state.sets)
        elif now >= score - 1e-12 and level < _LEVEL_MOVES:
            level += 1
        else:
            _apply(state, before)
    state.sets[:] = best_sets
    return best


def _apply(state: _State, move: Sequence[tuple[int, int]]) -> None:
    for expert, mask in move:
        changed = state.sets[expert] ^ mask
        while changed:
            low = changed & -changed
            node = low.bit_length() - 1
            state.used[node] += 1 if mask & low else -1
            changed ^= low
        state.sets[expert] = mask


def _propose(
    state: _State, replicas: Sequence[int], slots: int, dice: Dice
) -> list[tuple[int, int]] | None:
    """Draw a random move as (expert, new node set) pairs; None if the drawn move is illegal."""
    num_nodes, num_experts = len(state.used), len(replicas)
    kind = dice.below(4)
    a, node = dice.below(num_experts), dice.below(num_nodes)
    here = 1 << node
    mine = state.sets[a]
    if mine & here:
        return None
    room = state.used[node] < slots
    held = [n for n in range(num_nodes) if mine >> n & 1]
    full = len(held) >= replicas[a]
    if kind == 0 and room and not full:
        return [(a, mine | here)]
    old = held[dice.below(len(held))]
    moved = (mine | here) & ~(1 << old)
    if kind == 1 and room:
        return [(a, moved)]
    tenants = [e for e in range(num_experts) if e != a and state.sets[e] & here]
    if not tenants or kind < 2:
        return None
    b = tenants[dice.below(len(tenants))]
    theirs = state.sets[b]
    if kind == 2:  # swap
        return None if theirs >> old & 1 else [(a, moved), (b, (theirs & ~here) | 1 << old)]
    if dice.below(2) or full:  # evict: b moves to the old node of a, or loses one replica
        given = theirs & ~here
        if not theirs >> old & 1:
            return [(a, moved), (b, given | 1 << old)]
        return [(a, moved), (b, given)] if given else None
    given = theirs & ~here
    return [(a, mine | here), (b, given)] if given else None

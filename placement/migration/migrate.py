"""Moving from one plan to the next: the replicas to send, spread evenly over the senders.

Shapes: L layers, E experts, N nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.plan import Plan
from placement.request import Bools, Ints

_AUGMENT_UP_TO = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One replica to be copied to a rank of the new plan.

    Attributes:
        layer: Layer of the expert.
        expert: Id of the expert.
        source_rank: Sending rank of the previous plan; -1 if no replica is left.
        source_node: Node id of the sender; -1 if no replica is left.
        target_rank: Receiving rank of the new plan.
        target_node: Node id of the receiver.
        owners: Number of live replicas among which the source was chosen.
    """

    layer: int
    expert: int
    source_rank: int
    source_node: int
    target_rank: int
    target_node: int
    owners: int


def relabelled_member(wanted: Bools, node_of_position: Ints) -> Bools:
    """Return ``wanted`` [L, E, N] with plan positions replaced by nodes."""
    moved = np.zeros_like(wanted)
    moved[:, :, node_of_position] = wanted
    return moved


def transfers(
    previous: Plan, plan: Plan, *, lost: frozenset[int] = frozenset()
) -> tuple[Transfer, ...]:
    """List the replicas that ranks must receive to go from ``previous`` to ``plan``.

    Experts with the fewest live replicas come first. Senders are chosen so that the busiest one
    sends as little as possible. The result is the same on every rank.

    Args:
        previous: The plan in force until now.
        plan: The new plan.
        lost: Ids of nodes whose replicas are gone; they never send.

    Returns:
        One transfer per replica. ``source_rank`` is -1 if no replica is left, so that the expert
        must be restored from elsewhere.
    """
    live = _owners(previous, lost)
    held = _held(previous, lost)
    todo: list[Transfer] = []
    layer_, rank_, slot_ = np.nonzero(plan.expert_of_slot >= 0)
    expert_ = plan.expert_of_slot[layer_, rank_, slot_]
    for layer, rank, expert in zip(layer_.tolist(), rank_.tolist(), expert_.tolist(), strict=True):
        node = plan.node_ids[rank // plan.ranks_per_node]
        if (layer, expert, node, rank % plan.ranks_per_node) in held:
            continue
        todo.append(
            Transfer(
                layer=layer,
                expert=expert,
                source_rank=-1,
                source_node=-1,
                target_rank=rank,
                target_node=node,
                owners=len(live.get((layer, expert), ())),
            )
        )
    todo.sort(key=lambda t: (t.owners, t.layer, t.expert, t.target_rank))
    choices = [live.get((t.layer, t.expert), ()) for t in todo]
    senders = balanced_choice(choices)
    return tuple(
        replace(t, source_rank=s, source_node=previous.node_ids[s // previous.ranks_per_node])
        if s >= 0
        else t
        for t, s in zip(todo, senders, strict=True)
    )


def _owners(previous: Plan, lost: frozenset[int]) -> dict[tuple[int, int], tuple[int, ...]]:
    owners: dict[tuple[int, int], list[int]] = {}
    layer_, rank_, slot_ = np.nonzero(previous.expert_of_slot >= 0)
    expert_ = previous.expert_of_slot[layer_, rank_, slot_]
    for layer, rank, expert in zip(layer_.tolist(), rank_.tolist(), expert_.tolist(), strict=True):
        if previous.node_ids[rank // previous.ranks_per_node] not in lost:
            owners.setdefault((layer, expert), []).append(rank)
    return {key: tuple(sorted(ranks)) for key, ranks in owners.items()}


def _held(previous: Plan, lost: frozenset[int]) -> set[tuple[int, int, int, int]]:
    per_node = previous.ranks_per_node
    return {
        (layer, expert, previous.node_ids[rank // per_node], rank % per_node)
        for (layer, expert), ranks in _owners(previous, lost).items()
        for rank in ranks
    }


def balanced_choice(choices: Sequence[Sequence[int]]) -> list[int]:
    """Choose one option per row such that the most used option is used as rarely as possible.

    A greedy choice is improved along alternating paths until it is optimal. Beyond 20,000 rows the
    greedy choice is returned as it is.

    Args:
        choices: Options of each row, as ids.

    Returns:
        The chosen option of each row; -1 for a row without options.

    Source: Harvey, Ladner, Lovasz and Tamir, optimal semi-matchings.
    """
    load: dict[int, int] = {}
    chosen: list[int] = []
    for options in choices:
        best = min(options, key=lambda o: (load.get(o, 0), o), default=-1)
        if best >= 0:
            load[best] = load.get(best, 0) + 1
        chosen.append(best)
    if len(chosen) <= _AUGMENT_UP_TO:
        while _augment(choices, chosen, load):
            pass
    return chosen


def _augment(choices: Sequence[Sequence[int]], chosen: list[int], load: dict[int, int]) -> bool:
    """Take a row from a busiest option along one alternating path; False if there is no path."""
    if not load:
        return False
    rows_of: dict[int, list[int]] = {}
    for row, option in enumerate(chosen):
        rows_of.setdefault(option, []).append(row)
    peak = max(load.values())
    for start in sorted(o for o, n in load.items() if n == peak):
        came: dict[int, tuple[int, int]] = {}
        queue, seen = deque([start]), {start}
        while queue:
            here = queue.popleft()
            for row in rows_of.get(here, ()):
                for option in choices[row]:
                    if option in seen:
                        continue
                    seen.add(option)
                    came[option] = (here, row)
                    if load.get(option, 0) <= peak - 2:
                        _shift(option, came, chosen, load)
                        return True
                    queue.append(option)
    return False


def _shift(
    end: int, came: dict[int, tuple[int, int]], chosen: list[int], load: dict[int, int]
) -> None:
    option = end
    while option in came:
        before, row = came[option]
        chosen[row] = option
        load[option] = load.get(option, 0) + 1
        load[before] -= 1
        option = before


def busiest(todo: Sequence[Transfer]) -> tuple[int, int]:
    """Return the most replicas that any rank sends, and the most that any rank receives."""
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for t in todo:
        received[t.target_rank] = received.get(t.target_rank, 0) + 1
        if t.source_rank >= 0:
            sent[t.source_rank] = sent.get(t.source_rank, 0) + 1
    return max(sent.values(), default=0), max(received.values(), default=0)

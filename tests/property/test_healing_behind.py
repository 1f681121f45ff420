"""Replicas refilled behind training: at every moment each expert has one that serves."""

from __future__ import annotations

import numpy as np
import pytest

from lazarus.control.messages import Move
from lazarus.control.plans.healing import missing_after, split_moves, without
from lazarus.control.plans.verdict import needs, schedule_moves
from placement import PlacementRequest, Plan, replan

NODES, EXPERTS, SLOTS = 10, 16, 4


def skewed(rng: np.random.Generator) -> np.ndarray:
    """Zipf loads, [1, E], in random order."""
    return rng.permutation(np.arange(1, EXPERTS + 1) ** -1.5)[None] * 1e4


def planned(
    load: np.ndarray, nodes: list[int], previous: Plan | None, lost: frozenset[int]
) -> Plan:
    request = PlacementRequest(
        load=load,
        num_nodes=len(nodes),
        slots_per_node=SLOTS,
        min_replicas=2,
        node_ids=tuple(nodes),
    )
    return replan(request, previous=previous, lost=lost)


def held_by(plan: Plan, nodes: list[int]) -> dict[tuple[int, int], list[int]]:
    """Seats of the surviving nodes that hold each expert under an older plan."""
    found: dict[tuple[int, int], list[int]] = {}
    for expert in range(EXPERTS):
        holders = [plan.node_ids[rank] for rank in plan.ranks_of(0, expert)]
        found[0, expert] = sorted(nodes.index(n) for n in holders if n in nodes)
    return found


def served(plan: Plan) -> dict[int, set[int]]:
    ranks: dict[int, set[int]] = {e: set() for e in range(EXPERTS)}
    for rank, row in enumerate(plan.expert_of_slot[0]):
        for expert in row[row >= 0].tolist():
            ranks[expert].add(rank)
    return ranks


def check_refill(plan: Plan, before: tuple[Move, ...], behind: tuple[Move, ...]) -> None:
    """Round by round, one move at a time: nobody is without a replica, and sources have theirs."""
    missing = missing_after(behind)
    for move in (*behind, None):
        interim = without(plan, missing)
        ranks = served(interim)
        assert all(ranks.values())
        for expert, at in ranks.items():
            assert int(interim.home[0, expert]) in at
            shares = interim.share_of_slot[0][interim.expert_of_slot[0] == expert]
            assert shares.sum() == pytest.approx(1.0)
        if move is not None:
            assert move.source in ranks[move.expert]
            assert move.target not in ranks[move.expert]
            missing -= {(move.layer, move.expert, move.target)}
    assert {(m.expert, m.target) for m in before}.isdisjoint({(m.expert, m.target) for m in behind})


@pytest.mark.parametrize("seed", range(6))
def test_no_expert_is_without_a_serving_replica_while_loads_drift(seed: int) -> None:
    """D12: new plans put an expert only on ranks that did not hold it, a third of the time."""
    rng = np.random.default_rng(seed)
    hard = 0
    for _ in range(12):
        load = skewed(rng)
        nodes = list(range(NODES))
        plan = planned(load, nodes, None, frozenset())
        while len(nodes) > 8:  # with fewer, some experts have one replica only
            load = load * rng.lognormal(0, 0.5, load.shape)
            gone = int(rng.choice(nodes))
            nodes.remove(gone)
            after = planned(load, nodes, plan, frozenset({gone}))
            owners = held_by(plan, nodes)
            wanted = needs(after, num_seats=len(nodes))
            moves, lost = schedule_moves(wanted, owners)
            assert not lost
            before, behind = split_moves(moves, owners=owners, wanted=wanted)
            assert len(before) + len(behind) == len(moves)
            for move in before:
                assert move.source in owners[0, move.expert]
            hard += bool(before)
            check_refill(after, before, behind)
            plan = after
    assert hard, "no plan of these was of the kind that this test is about"


def test_what_stays_in_place_is_never_moved_before() -> None:
    owners, wanted = {(0, 0): [0, 1]}, {(0, 0): [1, 2, 3]}
    moves, _ = schedule_moves(wanted, owners)
    before, behind = split_moves(moves, owners=owners, wanted=wanted)
    assert not before
    assert {(m.source, m.target) for m in behind} == {(1, 2), (1, 3)}, "rank 0 frees its slot"

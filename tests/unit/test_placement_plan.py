"""Plans, staying in place and migration, by example."""

from __future__ import annotations

import numpy as np
import pytest
from placement_requests import request, zipf
from scipy.optimize import linprog

from placement import (
    InfeasiblePlacementError,
    InvalidRequestError,
    PlacementRequest,
    Plan,
    allocate_as_paper,
    allocate_replicas,
    certificate,
    plan,
    replan,
)
from placement.assignment.baselines import BASELINES, baseline
from placement.assignment.build import mixed_floors
from placement.balance.level import levelled
from placement.balance.shares import balance_of
from placement.migration.migrate import busiest, transfers
from placement.templates.order import block_risk, ordered_template
from placement.templates.template import segments
from placement.testing import assert_valid


def members(before: PlacementRequest, *, lost: set[int], joined: int = 0) -> PlacementRequest:
    ids = tuple(n for n in before.node_ids if n not in lost)
    ids += tuple(max(before.node_ids) + 1 + i for i in range(joined))
    return request(
        len(ids), before.slots_per_node, load=before.load, node_ids=ids,
        min_replicas=before.min_replicas, ranks_per_node=before.ranks_per_node,
    )  # fmt: skip


NONSENSE = [
    ({"load": [[1.0, -2.0]]}, "layer 0, expert 1 is -2.0"),
    ({"load": [[1.0, float("nan")]]}, "nan"),
    ({"load": [[1.0], [1.0, 2.0]]}, r"unequal numbers of experts: \[1, 2\]"),
    ({"load": []}, "shape"),
    ({"load": "abc"}, "not an array of numbers"),
    ({"load": [[1e308, 1e308]]}, "infinity"),
    ({"load": [[[1.0]]]}, r"\(1, 1, 1\)"),
    ({"slots": 0}, "slots_per_node=0"),
    ({"nodes": 0}, "num_nodes=0"),
    ({"nodes": 2.5}, "num_nodes=2.5"),
    ({"min_replicas": True}, "min_replicas=True"),
    ({"ranks_per_node": 4}, "slots_per_node=6 is no multiple of ranks_per_node=4"),
    ({"node_ids": (0, 1)}, "2 node_ids for num_nodes=10"),
    ({"node_ids": (0, 1, 2, 3, 4, 5, 6, 7, 9, 8)}, "ascending"),
    ({"domains": ("a",)}, "1 domains for num_nodes=10"),
    ({"hazards": (2.0,) * 10}, "hazard of node 0 is 2.0"),
    ({"profile": "brave"}, "'brave'"),
    ({"solver": "magic"}, "'magic'"),
    ({"resilience_weight": float("inf")}, "inf"),
]


@pytest.mark.parametrize(("options", "message"), NONSENSE)
def test_nonsense_is_refused_with_the_numbers(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        request(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(InfeasiblePlacementError, match=r"2 nodes x 6 slots = 12 < 16.*>= 3 nodes"):
        plan(request(2))
    with pytest.raises(InfeasiblePlacementError, match="min_replicas=4 .* there are 3"):
        plan(request(3, min_replicas=4))
    with pytest.raises(InfeasiblePlacementError, match="add 4 slots"):
        allocate_replicas([1, 2, 3], num_slots=5, min_replicas=3, max_replicas=4)


def test_a_floor_that_slots_do_not_allow_is_lowered_and_said() -> None:
    made = plan(request(5, 6))
    assert made.floor == 1 and made.requested_floor == 2
    assert "lowered from 2 to 1: 5 nodes x 6 slots for 16 experts" in made.notes[0]
    assert replan(request(1, 16), previous=None).floor == 1


def test_the_papers_worked_example() -> None:
    assert allocate_as_paper([100, 200, 300, 400], num_slots=14, min_replicas=2) == (2, 2, 4, 6)
    greedy = allocate_replicas([100, 200, 300, 400], num_slots=14, min_replicas=2, max_replicas=7)
    assert greedy.tolist() == [[2, 3, 4, 5]]


def test_a_plan_is_immutable_and_altered_plans_are_found_out() -> None:
    made = plan(request())
    with pytest.raises(ValueError, match="read-only"):
        made.home[0, 0] = 3
    data = made.to_dict()
    data["home"][0][0] += 1
    with pytest.raises(InvalidRequestError, match="altered"):
        Plan.from_dict(data)
    with pytest.raises(InvalidRequestError, match="format"):
        Plan.from_dict({"format": 99})
    with pytest.raises(InvalidRequestError, match="not a plan"):
        Plan.from_dict({"format": 1})


@pytest.mark.parametrize("ids", [(3, 1, 2), (1, 1, 2)])
def test_a_plan_whose_node_ids_do_not_ascend_is_refused(ids: tuple[int, ...]) -> None:
    data = plan(request(3, 8)).to_dict() | {"node_ids": list(ids)}
    del data["digest"]  # as in a plan made by others
    with pytest.raises(InvalidRequestError, match=r"must ascend"):
        Plan.from_dict(data)


def test_ranks_of_a_node_share_its_experts_evenly() -> None:
    made = plan(request(4, 8, ranks_per_node=4, load=zipf(2, 12, 1.0)))
    assert made.expert_of_slot.shape == (2, 16, 2)
    for expert in range(12):
        nodes = [r // 4 for r in made.ranks_of(0, expert)]
        assert len(set(nodes)) == len(nodes) >= 2


def test_one_loss_moves_nothing_while_the_floor_holds_and_refills_it_when_not() -> None:
    before = request()
    made = plan(before)
    for node in before.node_ids:
        after = members(before, lost={node})
        then = replan(after, previous=made, lost=frozenset({node}))
        assert_valid(then, after)
        assert then.floor >= 2
        stay = [i for i, n in enumerate(made.node_ids) if n != node]
        kept = made.node_member[:, :, stay] & then.node_member
        assert kept.sum() >= 0.8 * made.node_member[:, :, stay].sum()


def test_survivors_keep_their_ranks_inside_a_node() -> None:
    before = request(4, 8, ranks_per_node=4, load=zipf(2, 12, 1.0))
    made = plan(before)
    after = members(before, lost={1})
    then = replan(after, previous=made, lost=frozenset({1}))
    for position, node in enumerate(then.node_ids):
        old = made.node_ids.index(node)
        for rank in range(4):
            was = set(made.expert_of_slot[0, old * 4 + rank].tolist()) - {-1}
            now = set(then.expert_of_slot[0, position * 4 + rank].tolist()) - {-1}
            elsewhere = set(then.expert_of_slot[0, position * 4 : position * 4 + 4].ravel()) - now
            assert not was & elsewhere


def test_the_same_members_get_the_same_plan_and_a_member_cannot_be_lost() -> None:
    before = request()
    made = plan(before)
    assert replan(before, previous=made) is made
    with pytest.raises(InvalidRequestError, match=r"\[3\]"):
        replan(before, previous=made, lost=frozenset({3}))


def test_another_shape_is_planned_afresh() -> None:
    made = plan(request())
    other = request(10, 8)
    assert_valid(replan(other, previous=made), other)


def test_a_plan_without_template_is_laid_onto_one_where_its_replicas_are() -> None:
    before = request()
    foreign = baseline("spread", before)
    after = members(before, lost={2})
    then = replan(after, previous=foreign, lost=frozenset({2}))
    assert_valid(then, after)
    assert then.method.startswith("relabelled")
    fresh = plan(after)
    stay = [i for i, n in enumerate(foreign.node_ids) if n != 2]
    present = foreign.node_member[:, :, stay]
    assert (then.node_member & ~present).sum() <= (fresh.node_member & ~present).sum()


def test_transfers_come_from_live_owners_rarest_first_and_are_balanced() -> None:
    before = request()
    made = plan(before)
    after = members(before, lost={0}, joined=1)
    then = replan(after, previous=made, lost=frozenset({0}))
    todo = transfers(made, then, lost=frozenset({0}))
    assert [t.owners for t in todo] == sorted(t.owners for t in todo)
    assert {t.target_node for t in todo} >= {10}
    for t in todo:
        assert t.expert in made.expert_of_slot[t.layer, t.source_rank]
        assert t.source_node == made.node_ids[t.source_rank] != 0
    sent, received = busiest(todo)
    assert received == 4 * 6 and sent < received  # the joiner gets all its slots, from several


def test_an_expert_without_owner_has_no_sender() -> None:
    before = request(4, 2, load=[[1.0, 1.0, 1.0, 1.0]])
    made = plan(before)
    sets = made.node_member[0]
    lost = frozenset(int(n) for n in np.flatnonzero(sets[0]))
    after = members(before, lost=set(lost))
    then = replan(after, previous=made, lost=lost)
    todo = transfers(made, then, lost=lost)
    assert any(t.source_rank == -1 and t.expert == 0 and t.owners == 0 for t in todo)


def test_levelling_keeps_the_core_and_never_makes_a_layer_worse() -> None:
    load = np.array([[8.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    core = np.broadcast_to(np.eye(4, dtype=np.bool_), (2, 4, 4)).copy()
    member = core.copy()
    member[:, 1, 0] = member[:, 2, 1] = member[:, 3, 2] = True
    before = balance_of(load, member)
    after, _ = levelled(load, member, core, slots_per_node=2)
    assert (after & core == core).all() and after.sum(1).max() <= 2
    assert balance_of(load, after)[1] <= balance_of(load, member)[1] + 1e-3
    assert balance_of(load, after)[0] < 1.5 < 2.5 < before[0]


def test_shares_come_close_to_the_linear_programs_optimum() -> None:
    rng = np.random.default_rng(1)
    worst = 0.0
    for case in range(40):
        load = zipf(1, 8, float(rng.uniform(0, 1.5)), seed=case)
        member = plan(request(6, 4, load=load)).node_member
        optimum = lp_max_over_mean(load[0], member[0])
        worst = max(worst, float(balance_of(load, member)[0]) / optimum)
    assert worst < 1.02


def lp_max_over_mean(load: np.ndarray, member: np.ndarray) -> float:
    pairs = np.argwhere(member)
    nodes = member.shape[1]
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    equal = np.zeros((len(load), len(pairs) + 1))
    equal[pairs[:, 0], np.arange(len(pairs))] = 1.0
    upper = np.zeros((nodes, len(pairs) + 1))
    upper[pairs[:, 1], np.arange(len(pairs))] = load[pairs[:, 0]]
    upper[:, -1] = -load.sum() / nodes
    return float(
        linprog(cost, A_ub=upper, b_ub=np.zeros(nodes), A_eq=equal, b_eq=np.ones(len(load))).fun
    )


def test_every_baseline_makes_a_plan_and_ours_survives_more() -> None:
    calm = certificate(plan(request()), load=request().load)
    safe = certificate(plan(request(profile="safe")), load=request().load)
    for name in BASELINES:
        other = certificate(baseline(name, request()), load=request().load)
        assert all(safe.survival[k] >= other.survival[k] for k in (1, 2, 3, 4))
        assert calm.survival[2] >= other.survival[2]
        assert calm.max_over_mean <= other.max_over_mean + 0.002
    with pytest.raises(ValueError, match="'best'"):
        baseline("best", request())


def test_the_safe_profile_survives_at_least_as_much() -> None:
    for seed in range(3):
        load = zipf(4, 16, 1.0, seed=seed)
        calm = certificate(plan(request(load=load)), load=load)
        safe = certificate(plan(request(load=load, profile="safe")), load=load)
        assert safe.survival[2] >= calm.survival[2] - 1e-12
        assert safe.survival[2] == 1.0 and safe.survival[4] >= 0.92


def test_where_floors_take_all_slots_hot_and_cold_experts_share_blocks() -> None:
    load = (np.arange(1, 9) ** -1.2)[None] * 1e4
    tight = request(5, 4, load=load, profile="safe", solver="greedy")
    found = certificate(plan(tight), load=load)
    assert (found.survival[2], found.survival[3]) == (pytest.approx(0.9), pytest.approx(0.6))
    assert found.max_over_mean < 1.01  # by load rank the hot block of three nodes had 1.35


def test_experts_dealt_to_blocks_by_load_keep_the_blocks_places() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        load = rng.random((3, 9)) ** 3
        sizes, widths = np.tile([2, 3, 3], (3, 1)), np.tile([4, 2, 3], (3, 1))
        order = np.argsort(load, axis=1)
        by_rank = np.empty((3, 9), dtype=np.int32)
        np.put_along_axis(by_rank, order, np.tile(np.repeat([2, 3], [4, 5]), (3, 1)), axis=1)
        mixed = mixed_floors(load, by_rank, sizes, widths, order)
        assert ((mixed == 2).sum(1) == 4).all() and ((mixed == 3).sum(1) == 5).all()

        def busiest(floors: np.ndarray, load: np.ndarray = load) -> np.ndarray:
            two, three = (np.where(floors == s, load, 0).sum(1) for s in (2, 3))
            return np.maximum(two / 2, three / 6)

        assert (busiest(mixed) <= busiest(by_rank) + 1e-12).all()


def test_blocks_span_racks_and_do_not_gather_the_weak() -> None:
    racks = ("a", "a", "b", "b", "c", "c")
    template = segments((2, 2, 2), (2, 2, 2))
    spread = ordered_template(template, num_nodes=6, domains=racks)
    assert all(len({racks[n] for n in nodes}) == 2 for nodes, _ in spread)
    hazards = (0.5, 0.5, 0.1, 0.1, 0.01, 0.01)
    mixed = ordered_template(template, num_nodes=6, hazards=hazards)
    before = sum(block_risk(nodes, (), hazards) for nodes, _ in template)
    after = sum(block_risk(nodes, (), hazards) for nodes, _ in mixed)
    assert after < before / 10
    made = plan(request(6, 6, domains=racks, hazards=hazards))
    found = certificate(made, domains=racks, hazards=hazards)
    assert found.domain_survival[1] == 1.0
    assert found.hazard_survival is not None and 0.8 < found.hazard_survival < 1.0


def test_the_certificate_of_a_known_plan() -> None:
    made = plan(request(3, 2, load=[1.0, 1.0, 1.0]))
    found = certificate(made)
    assert found.survival == {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}
    assert found.min_distinct_nodes == 2 and len(found.fatal_nodes) == 2
    assert found.max_over_mean == pytest.approx(1.0, abs=1e-3)
    assert "survives losses of" in found.table() and "distinct nodes" in found.table()
    assert found.to_json()["survival"]["1"] == 1.0
    with pytest.raises(InvalidRequestError, match="3 experts"):
        certificate(made, load=[1.0, 2.0])

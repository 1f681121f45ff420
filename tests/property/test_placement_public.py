"""Laws of the public functions around planning: baselines, homes, order, foreign plans."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_search import searched

from lazarus.commands.plan import as_object
from placement import PlacementRequest, certificate, plan
from placement.assignment.baselines import BASELINES, baseline
from placement.assignment.homes import choose_homes
from placement.foreign import certified
from placement.survival.bitmasks import minimal_masks
from placement.survival.resilience import domain_masks, survival, survival_under_hazards
from placement.survival.truth import surviving_counts
from placement.templates.order import block_risk, ordered_template
from placement.templates.template import segments

FEW = settings(max_examples=40, deadline=None)


@st.composite
def requests(draw: st.DrawFn) -> PlacementRequest:
    experts, nodes = draw(st.integers(1, 10)), draw(st.integers(1, 7))
    row = st.lists(st.floats(0, 1e6), min_size=experts, max_size=experts)
    return PlacementRequest(
        load=[draw(row) for _ in range(draw(st.integers(1, 2)))],
        num_nodes=nodes,
        slots_per_node=-(-experts // nodes) + draw(st.integers(0, 4)),
        min_replicas=draw(st.integers(1, nodes)),
        solver="greedy",
    )


@given(request=requests(), name=st.sampled_from(list(BASELINES)))
@FEW
def test_a_baseline_keeps_to_slots_and_forgets_no_expert(
    request: PlacementRequest, name: str
) -> None:
    made = baseline(name, request)
    assert made.node_member.sum(1).max() <= request.slots_per_node
    assert made.replicas.min() >= 1
    assert np.abs(made.shares.sum(2) - 1).max() < 1e-9


@given(request=requests())
@FEW
def test_homes_hold_their_experts_and_no_single_move_helps(request: PlacementRequest) -> None:
    made = plan(request)
    home = choose_homes(request.load, made.expert_of_slot)
    for layer, row in enumerate(home):
        use = np.bincount(row, weights=request.load[layer], minlength=made.num_ranks)
        for expert, rank in enumerate(row):
            ranks = made.ranks_of(layer, expert)
            assert rank in ranks
            load = request.load[layer, expert]
            if load > 0 and use[rank] == use.max() and (use == use.max()).sum() == 1:
                others = [use[r] + load for r in ranks if r != rank]
                assert all(other >= use[rank] * (1 - 1e-6) for other in others)


@given(request=requests())
@FEW
def test_a_fleet_s_homes_are_found_as_those_of_few_ranks(request: PlacementRequest) -> None:
    slots = plan(request).expert_of_slot
    with pytest.MonkeyPatch.context() as patch:
        dense = choose_homes(request.load, slots)
        patch.setattr("placement.assignment.homes._FLEET", 1)
        assert (choose_homes(request.load, slots) == dense).all()


@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@FEW
def test_an_ordered_template_renames_nodes_and_never_adds_risk_by_a_swap(
    data: st.DataObject, sizes: list[int]
) -> None:
    template, nodes = segments(sizes, [1] * len(sizes)), sum(sizes)
    racks = data.draw(st.lists(st.sampled_from("abc"), min_size=nodes, max_size=nodes))
    found = ordered_template(template, num_nodes=nodes, domains=racks)
    assert [len(ns) for ns, _ in found] == sizes
    assert sorted(n for ns, _ in found for n in ns) == list(range(nodes))

    def risk(blocks: list[set[int]]) -> float:
        return sum(block_risk(sorted(b), racks, ()) for b in blocks)

    blocks = [set(ns) for ns, _ in found]
    best = risk(blocks)
    for a in range(len(blocks)):
        for b in range(a):
            for x in blocks[a]:
                for y in blocks[b]:
                    new = list(blocks)
                    new[a], new[b] = blocks[a] - {x} | {y}, blocks[b] - {y} | {x}
                    assert risk(new) >= best - 1e-12


@given(request=requests())
@FEW
def test_a_plan_told_as_json_is_certified_as_it_was(request: PlacementRequest) -> None:
    made = plan(request)
    found = certificate(made, load=request.load)
    told = json.loads(json.dumps(as_object(made, found, method=made.method, wall_ms=1.0)))
    again, claims = certified(told, load=request.load)
    theirs = certificate(again, load=request.load)
    assert claims(theirs) == []
    assert theirs.survival == found.survival
    assert theirs.max_over_mean == pytest.approx(found.max_over_mean, rel=1e-6)
    for key, wrong in (("min_distinct_nodes", 99), ("survival", {"0": 0.5}),
                       ("max_over_mean", 0.2)):  # fmt: skip
        _, claims = certified({**told, key: wrong}, load=request.load)
        assert len(claims(theirs)) == 1


@given(sets=st.lists(st.integers(1, 63), min_size=1, max_size=6),
       racks=st.lists(st.integers(0, 2), min_size=6, max_size=6),
       hazard=st.floats(0, 1))  # fmt: skip
@FEW
def test_equal_hazards_are_the_binomial_of_survival_and_racks_a_coarser_cluster(
    sets: list[int], racks: list[int], hazard: float
) -> None:
    counts = surviving_counts(minimal_masks(sets), num_nodes=6)
    chance = sum(c * hazard**k * (1 - hazard) ** (6 - k) for k, c in enumerate(counts))
    assert survival_under_hazards(sets, hazards=[hazard] * 6) == pytest.approx(chance, abs=1e-12)
    of_rack = domain_masks(sets, racks)
    for dead in range(8):
        nodes = sum(1 << n for n in range(6) if dead >> racks[n] & 1)
        assert any(s & ~nodes == 0 for s in sets) == any(m & ~dead == 0 for m in of_rack)
    assert survival(of_rack, num_nodes=3).probability[0] == 1.0


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=5), slots=st.integers(1, 4))
@FEW
def test_a_search_keeps_to_replicas_and_slots(counts: list[int], slots: int) -> None:
    counts = sorted(counts)
    if sum(counts) > 5 * slots:
        return
    sets, score = searched(counts, num_nodes=5, slots_per_node=slots, starts=2, evaluations=30)
    assert all(1 <= s.bit_count() <= r for s, r in zip(sets, counts, strict=True))
    assert all(sum(s >> n & 1 for s in sets) <= slots for n in range(5))
    assert 0 <= score <= 6

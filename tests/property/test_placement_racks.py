"""Laws of repair and relabelling where nodes differ in rack and hazard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import PlacementRequest, plan, replan
from placement.assignment.baselines import baseline
from placement.migration.cores import repaired_blocks
from placement.templates.order import block_risk, on_nodes
from placement.templates.template import Template, segments
from placement.testing import assert_valid


@st.composite
def uneven_nodes(draw: st.DrawFn) -> tuple[PlacementRequest, int]:
    """A cluster of racks of two or three with unequal hazards, and the node that will be lost."""
    racks = draw(st.integers(2, 4))
    names = [r for r in range(racks) for _ in range(draw(st.integers(2, 3)))]
    nodes = len(names)
    experts = draw(st.integers(2, 12))
    least = -(-2 * experts // (nodes - 1))
    request = PlacementRequest(
        load=[draw(st.lists(st.floats(1, 1e3), min_size=experts, max_size=experts))],
        num_nodes=nodes,
        slots_per_node=min(experts, least + draw(st.integers(0, 2))),
        domains=tuple(draw(st.permutations(names))),
        hazards=tuple(draw(st.lists(st.floats(0.01, 0.5), min_size=nodes, max_size=nodes))),
        profile=draw(st.sampled_from(["balanced", "safe"])),
        solver="greedy",
    )
    return request, draw(st.integers(0, nodes - 1))


def without(request: PlacementRequest, node: int) -> PlacementRequest:
    stay = [i for i, n in enumerate(request.node_ids) if n != node]
    return replace(
        request,
        num_nodes=len(stay),
        node_ids=tuple(request.node_ids[i] for i in stay),
        domains=tuple(request.domains[i] for i in stay),
        hazards=tuple(request.hazards[i] for i in stay),
    )


def confined(template: Template, racks: Sequence[int | str]) -> int:
    return sum(len({racks[n] for n in nodes}) < 2 for nodes, _ in template)


def exchanged(template: Template, slots: int, num_nodes: int) -> Iterator[Template]:
    """Every template that one exchange of two nodes, or of a node for one outside, leads to."""
    blocks = [set(nodes) for nodes, _ in template]
    widths = [width for _, width in template]
    for a in range(len(blocks)):
        for out, come in product(sorted(blocks[a]), range(num_nodes)):
            for b in range(-1, len(blocks)):
                if b == a or come in blocks[a]:
                    continue
                new = [set(block) for block in blocks]
                new[a] = (new[a] - {out}) | {come}
                if b >= 0:
                    if come not in blocks[b] or out in blocks[b]:
                        continue
                    new[b] = (new[b] - {come}) | {out}
                used = [
                    sum(w for n, w in zip(new, widths, strict=True) if i in n)
                    for i in range(num_nodes)
                ]
                if max(used) <= slots:
                    yield tuple((tuple(sorted(n)), w) for n, w in zip(new, widths, strict=True))


@given(case=uneven_nodes())
@settings(max_examples=60, deadline=None)
def test_a_repair_in_place_leaves_no_block_in_one_rack_that_an_exchange_could_free(
    case: tuple[PlacementRequest, int],
) -> None:
    request, node = case
    before = plan(request)
    after = without(request, node)
    made = replan(after, previous=before, lost=frozenset({node}))
    assert_valid(made, after)
    assert replan(after, previous=before, lost=frozenset({node})) == made
    here = confined(made.template, after.domains)
    for other in exchanged(made.template, after.slots_per_node, after.num_nodes):
        assert confined(other, after.domains) >= here


@given(floor=st.integers(1, 3), more=st.lists(st.integers(0, 2), min_size=1, max_size=4),
       data=st.data())  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_refill_takes_the_node_that_leaves_the_least_risk(
    floor: int, more: list[int], data: st.DataObject
) -> None:
    sizes = [floor - 1, *(floor + m for m in more)]  # the first block has lost a node
    template, nodes = segments(sizes, [2] * len(sizes)), sum(sizes)
    each = {"min_size": nodes, "max_size": nodes}
    hazards = data.draw(st.lists(st.sampled_from([0.01, 0.1, 0.3, 0.5]), **each))
    racks = data.draw(st.lists(st.integers(0, 2), **each))
    held = np.array(data.draw(st.lists(st.lists(st.integers(0, 2), **each),
                                       min_size=len(sizes), max_size=len(sizes))))  # fmt: skip
    made = repaired_blocks(
        template, joiners=(), held_BN=held, slots_per_node=2, floor=floor,
        risk=partial(block_risk, domains=racks, hazards=hazards),
    )  # fmt: skip
    if max(more) == 0:
        assert made is None
        return
    assert made is not None
    risks, largest = [], max(sizes)
    for donor in (b for b, size in enumerate(sizes) if size == largest):
        for node in template[donor][0]:
            blocks = [set(ns) for ns, _ in template]
            blocks[donor].discard(node)
            blocks[0].add(node)
            risks.append(sum(block_risk(sorted(b), racks, hazards) for b in blocks))
    total = sum(block_risk(ns, racks, hazards) for ns, _ in made)
    assert total == pytest.approx(min(risks), abs=1e-11)
    plain = repaired_blocks(template, joiners=(), held_BN=held, slots_per_node=2, floor=floor)
    assert plain is not None and sorted(len(n) for n, _ in plain) == sorted(len(n) for n, _ in made)


@given(case=uneven_nodes())
@settings(max_examples=40, deadline=None)
def test_a_relabelled_plan_spans_racks_as_well_as_a_fresh_one_can_by_swaps(
    case: tuple[PlacementRequest, int],
) -> None:
    request, node = case
    foreign = baseline("spread", request)
    after = without(request, node)
    made = replan(after, previous=foreign, lost=frozenset({node}))
    assert_valid(made, after)
    assert made.method.startswith("relabelled")

    def risk(template: Template) -> float:
        return sum(block_risk(ns, after.domains, after.hazards) for ns, _ in template)

    for a, b in product(range(after.num_nodes), repeat=2):
        names = list(range(after.num_nodes))
        names[a], names[b] = b, a
        assert risk(on_nodes(made.template, names)) >= risk(made.template) - 1e-9

"""Which node joins, refills or changes a block: small cases by hand."""

from __future__ import annotations

import numpy as np

from placement.migration.cores import repaired_blocks, unconfined_blocks
from placement.templates.family import complementary_tail
from placement.templates.order import block_risk
from placement.templates.template import Template


def test_a_joiner_goes_to_the_block_whose_risk_it_lowers_most_the_hottest_on_a_tie() -> None:
    def joined(racks: str) -> list[tuple[int, ...]]:
        held = np.zeros((2, 4), dtype=np.int64)
        blocks = repaired_blocks(
            [((0,), 1), ((3,), 1)], joiners=[2], held_BN=held, slots_per_node=1, floor=1,
            risk=lambda nodes: block_risk(nodes, racks, ()),
        )  # fmt: skip
        assert blocks is not None
        return [nodes for nodes, _ in blocks]

    assert joined("aabc") == [(0,), (2, 3)]  # either would span two racks
    assert joined("aabb") == [(0, 2), (3,)]
    assert joined("abbb") == [(0, 2), (3,)]
    assert joined("aaac") == [(0,), (2, 3)]


def test_nodes_whose_slots_are_all_taken_may_still_change_places() -> None:
    held = np.zeros((2, 4), dtype=np.int64)
    full = (((0, 1), 1), ((2, 3), 1))

    def exchanged(racks: str, *, slots: int = 1, template: Template = full) -> list[set[str]]:
        found = unconfined_blocks(
            template, domain_of_node=racks, held_BN=held, slots_per_node=slots
        )
        return [{racks[n] for n in nodes} for nodes, _ in found]

    assert exchanged("aabb") == [{"a", "b"}] * 2
    assert exchanged("aaaa") == [{"a"}] * 2 and exchanged("abab") == [{"a", "b"}] * 2
    uneven = (((0, 1), 2), ((2, 3), 1))
    assert exchanged("aabb", slots=2, template=uneven) == [{"a", "b"}] * 2
    assert exchanged("aabb", slots=1, template=(((0, 1), 1), ((2, 3), 2))) == [{"a"}, {"b"}]


def test_a_block_takes_a_node_that_has_room_once_its_donor_let_go() -> None:
    def refilled(slots: int, wide: int) -> list[tuple[int, ...]] | None:
        held = np.zeros((2, 4), dtype=np.int64)
        blocks = repaired_blocks(
            [((0, 1, 2), wide), ((3,), 2)], joiners=[], held_BN=held, slots_per_node=slots, floor=2
        )
        return None if blocks is None else [nodes for nodes, _ in blocks]

    assert refilled(2, 2) == [(1, 2), (0, 3)]  # two of two slots: taken over from the other block
    assert refilled(2, 1) == [(1, 2), (0, 3)]
    assert refilled(1, 1) is None  # two experts fit no node
    assert refilled(4, 2) == [(0, 1, 2), (0, 3)]  # there is room beside the other block


def test_parts_that_leave_a_block_no_node_are_no_tail() -> None:
    assert complementary_tail([1, 1], num_nodes=1, excess=1, parts=2) is None
    assert complementary_tail([1, 1, 1], num_nodes=3, excess=1, parts=3) == (
        ((2,), 1), ((1,), 1), ((0,), 1),
    )  # fmt: skip
    halves = complementary_tail([2, 2, 3, 3], num_nodes=4, excess=2, parts=2)
    assert halves == (((2, 3), 2), ((0, 1), 2))

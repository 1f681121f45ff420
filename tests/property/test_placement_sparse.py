"""What plans read off their replicas by list, against the same by plain loops over all cells."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from placement import PlacementRequest, plan
from placement.assignment.build import slots_of
from placement.balance.shares import count_width, replicas_on_nodes
from placement.migration.cores import held_by_block
from placement.migration.repair import surviving
from placement.request import Bools

MEMBERS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays(np.bool_, shape)
)


@given(member=MEMBERS, seed=st.integers(0, 99))
def test_replicas_of_a_block_are_counted_on_every_node(member: Bools, seed: int) -> None:
    layers, experts, nodes = member.shape
    block_LE = np.random.default_rng(seed).integers(-1, 3, (layers, experts)).astype(np.int32)
    held = held_by_block(member, block_LE, 3)
    assert held.dtype == np.int64 and held.shape == (3, nodes)
    for block in range(3):
        for node in range(nodes):
            assert held[block, node] == member[:, :, node][block_LE == block].sum()


@given(member=MEMBERS)
def test_a_node_s_replicas_are_counted(member: Bools) -> None:
    assert (replicas_on_nodes(member) == member.sum(1)).all()


def test_counts_do_not_wrap_however_many_experts_a_node_holds() -> None:
    assert count_width(65_535) is np.uint16 and count_width(65_536) is np.int32
    for experts in (65_535, 65_536, 70_000):
        assert replicas_on_nodes(np.ones((1, experts, 2), dtype=np.bool_)).tolist() == [
            [experts, experts]
        ]


@given(member=MEMBERS)
def test_a_node_s_slots_name_its_experts_in_order(member: Bools) -> None:
    layers, experts, nodes = member.shape
    slots = slots_of(member, np.ones((layers, experts)), ranks_per_node=1, slots_per_rank=experts)
    for layer in range(layers):
        for node in range(nodes):
            held = np.flatnonzero(member[layer, :, node]).tolist()
            assert slots[layer, node].tolist() == held + [-1] * (experts - len(held))


@given(stay=st.sets(st.integers(0, 5), min_size=1), joined=st.integers(0, 2))
def test_replicas_of_nodes_that_stay_live_on(stay: set[int], joined: int) -> None:
    load = np.ones((2, 4))
    before = plan(PlacementRequest(load=load, num_nodes=6, slots_per_node=4, node_ids=range(6)))
    ids = (*sorted(stay), *range(6, 6 + joined))
    request = PlacementRequest(load=load, num_nodes=len(ids), slots_per_node=4, node_ids=ids)
    member, origin = surviving(before, request)
    assert origin.tolist() == [*sorted(stay), *[-1] * joined]
    for node, old in enumerate(origin.tolist()):
        expected = before.node_member[:, :, old] if old >= 0 else np.zeros((2, 4), dtype=bool)
        assert (member[:, :, node] == expected).all()

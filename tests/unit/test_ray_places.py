"""Which machine a node is put on: spread, refused with numbers, never on what drains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.errors import ConfigError
from lazarus.runtime.ray_nodes import Places, RayNode, parse_bytes


def machine(id: str, cpus: float, labels: Mapping[str, str] | None = None) -> RayNode:
    return RayNode(id=id, host=f"10.0.0.{id}", free={"CPU": cpus}, labels=labels or {})


def places(*nodes: RayNode, cpus: float = 1.0, labels: Mapping[str, str] | None = None) -> Places:
    made = Places({"CPU": cpus, "GPU": 0.0}, labels=labels or {})
    made.see(nodes)
    return made


def homes(made: Places, count: int) -> list[str]:
    found = [made.place(f"node-{i}") for i in range(count)]
    return [node.id for node in found if node is not None]


def test_each_machine_gets_one_node_before_any_gets_two() -> None:
    made = places(machine("1", 4), machine("2", 4), machine("3", 4))
    assert homes(made, 3) == ["1", "2", "3"]
    assert homes(places(machine("1", 4), machine("2", 4)), 4) == ["1", "2", "1", "2"]


@given(
    cpus=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    need=st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    wanted=st.integers(1, 12),
)
def test_no_machine_is_overbooked_and_room_is_what_fits(
    cpus: list[int], need: float, wanted: int
) -> None:
    made = places(*(machine(str(i), float(c)) for i, c in enumerate(cpus)), cpus=need)
    room = made.room()
    placed = homes(made, wanted)
    assert len(placed) == min(wanted, room)
    for id, count in Counter(placed).items():
        assert count * need <= cpus[int(id)]
    assert made.room() == room - len(placed)


def test_a_node_that_is_gone_gives_its_place_back_but_fresh_machines_come_first() -> None:
    made = places(machine("1", 2), machine("2", 2))
    homes(made, 2)
    made.close("node-0")
    assert made.see([machine("1", 1), machine("2", 1), machine("3", 2)]) == ("3",)
    replacement = made.place("node-2")
    assert replacement is not None
    assert replacement.id == "3"  # machine 1 lost a node before: it may be ill
    assert made.see([machine("3", 2)]) == ()
    assert made.num_open == 2


def test_a_draining_machine_is_told_of_once_and_takes_nothing_more() -> None:
    made = places(machine("1", 2), machine("2", 2))
    homes(made, 3)
    assert made.drain("1") == ("node-0", "node-2")
    assert made.drain("1") == ()
    assert homes(made, 4) == ["2"]


def test_labels_decide_who_may_serve() -> None:
    spot = {"market": "spot"}
    made = places(machine("1", 8), machine("2", 1, spot), labels=spot)
    assert homes(made, 2) == ["2"]
    assert "with the labels market=spot (cluster.node_labels)" in made.shortage(2)


def test_a_shortage_has_the_numbers_and_the_way_out() -> None:
    made = places(machine("1", 2), machine("2", 2), machine("3", 1), cpus=2.0)
    assert made.shortage(4) == (
        "cluster.nodes=4 nodes need 2 CPUs each, but the cluster has room for 2: 1 Ray node with "
        "1 CPU free; 2 Ray nodes with 2 CPUs free; lower cluster.nodes or cluster.cpus_per_rank, "
        "or add Ray nodes"
    )
    assert "no Ray node" in places().shortage(1)


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("500 MB") == 500e6
    assert parse_bytes("1.5K") == 1500
    with pytest.raises(ConfigError, match=r'cluster.memory_per_rank = "lots" is no size'):
        parse_bytes("lots")

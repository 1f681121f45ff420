"""Which machine a node is put on: spread, refused with numbers, never on what drains."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.errors import ConfigError
from lazarus.runtime.launch.ray_nodes import Places, RayNode, parse_bytes


def machine(id: str, cpus: float, labels: Mapping[str, str] | None = None) -> RayNode:
    return RayNode(id=id, host=f"10.0.0.{id}", free={"CPU": cpus}, labels=labels or {})


def places(*nodes: RayNode, cpus: float = 1.0, labels: Mapping[str, str] | None = None) -> Places:
    made = Places({"CPU": cpus, "GPU": 0.0}, labels=labels or {})
    made.see(nodes)
    return made


def rooms(made: Places) -> dict[str, int]:
    return {machine.id: machine.room for machine in made.machines() if machine.room}


@given(
    cpus=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    need=st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    picks=st.lists(st.integers(0, 5), max_size=12),
)
def test_no_machine_is_overbooked_while_rooms_are_promised_and_reserved(
    cpus: list[int], need: float, picks: list[int]
) -> None:
    made = places(*(machine(str(i), float(c)) for i, c in enumerate(cpus)), cpus=need)
    free = {str(i): float(c) for i, c in enumerate(cpus)}
    for number, pick in enumerate(picks):
        if not (able := sorted(rooms(made))):
            break
        chosen = able[pick % len(able)]
        made.promise(f"node-{number}", chosen)
        if pick % 2:  # the reservation came through, and Ray says so
            free[chosen] -= need
            made.reserved(f"node-{number}")
            made.update(machine(id, left) for id, left in free.items())
    for id in free:
        assert made.num_on(id) * need <= cpus[int(id)]


def test_what_is_free_is_asked_when_it_is_needed() -> None:
    """R4: a machine that was busy at first has room later, and the other way round."""
    made = places(machine("1", 0), machine("2", 1))
    assert rooms(made) == {"2": 1}
    made.update([machine("1", 1), machine("2", 0)])
    assert rooms(made) == {"1": 1}


def test_a_promise_that_comes_to_nothing_gives_the_room_back() -> None:
    made = places(machine("1", 1))
    made.promise("node-0", "1")
    assert rooms(made) == {}
    made.close("node-0")
    assert rooms(made) == {"1": 1}


def test_only_machines_that_were_never_there_count_as_new() -> None:
    made = places(machine("1", 2))
    silent = RayNode(id="3", host="h", free={}, labels={})  # its raylet has not reported yet
    assert made.see([machine("1", 1), machine("2", 1), silent]) == ("2",)
    assert made.see([machine("2", 1), machine("3", 1)]) == ("3",)
    assert made.see([machine("1", 1), machine("3", 1)]) == ()


def test_a_draining_machine_is_told_of_once_and_takes_nothing_more() -> None:
    made = places(machine("1", 2), machine("2", 2))
    made.promise("node-0", "1")
    made.promise("node-1", "2")
    assert made.drain("1") == ("node-0",)
    assert made.drain("1") == ()
    assert rooms(made) == {"2": 1}


def test_labels_decide_who_may_serve() -> None:
    spot = {"market": "spot"}
    made = places(machine("1", 8), machine("2", 1, spot), labels=spot)
    assert rooms(made) == {"2": 1}
    assert "with the labels market=spot (cluster.node_labels)" in made.shortage()


def test_a_shortage_has_the_numbers_and_the_way_out() -> None:
    made = places(machine("1", 2), machine("2", 2), machine("3", 1), cpus=2.0)
    assert made.shortage() == (
        "a node needs 2 CPUs; the cluster has 1 Ray node with 1 CPU free; 2 Ray nodes with 2 CPUs "
        "free; add Ray nodes, wait, or lower cluster.nodes or cluster.cpus_per_rank"
    )
    assert "no Ray node" in places().shortage()


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("500 MB") == 500e6
    assert parse_bytes("1.5K") == 1500
    with pytest.raises(ConfigError, match=r'cluster.memory_per_rank = "lots" is no size'):
        parse_bytes("lots")

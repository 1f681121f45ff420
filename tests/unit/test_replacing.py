"""Which machine a lost node is started on, when, and which machine is left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fleet_limits import limits
from hypothesis import given
from hypothesis import strategies as st

from lazarus.control.cluster.replacing import (
    MOST_TROUBLES,
    Fleet,
    History,
    Machine,
    came_up,
    ends_machine,
    gone,
    held,
    hopeless,
    ordered,
    overdue,
    starts,
    taken,
)


def machines(*names: str, room: int = 1) -> list[Machine]:
    return [Machine(id=name, room=room) for name in names]


def running(*homes: str, wanted: int = 0, **more: object) -> Fleet:
    """One node a machine, all up since 0 s."""
    fleet = Fleet(limits=limits(wanted=wanted or len(homes), **more))
    for number, home in enumerate(homes):
        fleet = ordered(fleet, f"node-{number}", home, now_s=0.0)
        fleet = came_up(fleet, f"node-{number}", now_s=0.0)
    return fleet


def lose(fleet: Fleet, key: str, *, now_s: float, is_silent: bool = False) -> Fleet:
    fleet, _ = gone(fleet, key, cause="SIGKILL", now_s=now_s, is_silent=is_silent)
    return fleet


def test_what_died_by_itself_is_started_again_at_once_where_it_was() -> None:
    fleet = lose(running("a", "b", "c"), "node-1", now_s=100.0)
    assert fleet.missing == 1
    assert starts(fleet, machines("b"), count=1, now_s=100.0) == ("b",)


def test_a_spare_machine_comes_before_the_one_where_the_node_died() -> None:
    """R2, R3: a spare never idles, and what has just died is the last choice."""
    fleet = lose(running("x", "y", "z"), "node-0", now_s=100.0)
    assert starts(fleet, machines("x", "spare"), count=1, now_s=100.0) == ("spare",)
    fleet = lose(fleet, "node-1", now_s=103.0)
    assert starts(fleet, machines("y", "x"), count=2, now_s=103.0) == ("x", "y")


def test_a_machine_that_fell_silent_rests_even_if_there_is_no_other() -> None:
    fleet = lose(running("a", "b"), "node-0", now_s=50.0, is_silent=True)
    assert starts(fleet, machines("a"), count=1, now_s=50.0) == ()
    assert starts(fleet, machines("a"), count=1, now_s=55.0) == ("a",)


def test_a_place_that_went_with_its_node_is_used_again_only_for_a_run_that_holds() -> None:
    fleet = lose(ends_machine(running("a", "b"), "node-0"), "node-0", now_s=9.0)
    assert fleet.missing == 1
    assert starts(fleet, machines("a"), count=1, now_s=1e6) == ()
    fleet = held(fleet, needed=2)
    assert starts(fleet, machines("a"), count=fleet.missing, now_s=9.0) == ("a",)
    assert held(running("a", "b"), needed=2) == running("a", "b")


def test_where_no_machine_comes_a_place_that_is_gone_is_not_waited_for() -> None:
    fleet = lose(ends_machine(running("a", "b", is_fixed=True), "node-0"), "node-0", now_s=9.0)
    assert fleet.missing == 0
    fleet = held(fleet, needed=2)
    assert starts(fleet, machines("a"), count=fleet.missing, now_s=9.0) == ("a",)


def test_without_replacing_a_loss_lowers_what_is_wanted_and_a_failed_start_does_not() -> None:
    fleet = running("a", "b", replaces=False)
    assert lose(fleet, "node-0", now_s=1.0).missing == 0
    assert held(lose(fleet, "node-0", now_s=1.0), needed=2).missing == 1
    fleet = ordered(Fleet(limits=limits(wanted=1, replaces=False)), "node-0", "a", now_s=0.0)
    assert lose(fleet, "node-0", now_s=1.0).missing == 1


def test_a_machine_on_which_nodes_die_again_and_again_rests_longer_and_is_then_left_alone() -> None:
    fleet, now, rests, verdicts = running("a", is_fixed=True), 0.0, [], []
    for number in range(MOST_TROUBLES):
        fleet, said = gone(fleet, f"node-{number}", cause="SIGKILL", now_s=now)
        verdicts += said
        waited = max(0.0, fleet.history("a").rests_until_s - now)
        rests.append(waited)
        now += waited
        fleet = ordered(fleet, f"node-{number + 1}", "a", now_s=now)
        fleet = came_up(fleet, f"node-{number + 1}", now_s=now)
    assert rests == [0.0, 5.0, 10.0, 20.0, 40.0, 80.0]
    assert [v.is_banned for v in verdicts] == [False, True]  # suspect first
    assert "6 nodes in a row" in verdicts[-1].reason and "SIGKILL" in verdicts[-1].reason
    fleet = taken(fleet, f"node-{MOST_TROUBLES}")
    assert starts(fleet, machines("a", "b"), count=2, now_s=1e9) == ("b",)
    assert hopeless(fleet, machines("a")) == fleet.history("a").banned
    assert not hopeless(fleet, machines("a", "b"))


def test_a_node_that_was_well_for_long_makes_its_machine_trusted_again_but_losses_are_counted() -> (
    None
):
    fleet, said = running("a"), []
    for number in range(3):
        fleet, verdicts = gone(fleet, f"node-{number}", cause="x", now_s=100.0 * (number + 1))
        said += verdicts
        assert fleet.history("a").troubles == 1
        fleet = ordered(fleet, f"node-{number + 1}", "a", now_s=100.0 * (number + 1))
        fleet = came_up(fleet, f"node-{number + 1}", now_s=100.0 * (number + 1))
    assert [(v.is_banned, v.reason) for v in said] == [
        (False, "3 nodes were lost there; the last one: x")
    ]


def test_what_does_not_come_up_in_time_has_failed_and_is_tried_elsewhere() -> None:
    fleet = ordered(running("a", wanted=2), "node-1", "slow", now_s=10.0)
    assert overdue(fleet, now_s=300.0) == ()
    assert overdue(fleet, now_s=311.0) == ("node-1",)
    fleet = lose(fleet, "node-1", now_s=311.0)
    assert starts(fleet, machines("slow", "b"), count=1, now_s=311.0) == ("b",)
    assert starts(fleet, machines("slow"), count=1, now_s=311.0) == ()


def test_starts_that_fail_together_are_one_trouble_of_their_machine() -> None:
    """A machine that is slow to start three processes at a time is not banned after two rounds."""
    fleet = Fleet(limits=limits(wanted=3, rest_s=1.0))
    for number in range(MOST_TROUBLES):
        now_s = 1000.0 * number
        keys = [f"node-{number}-{i}" for i in range(3)]
        assert starts(fleet, machines("a", room=3), count=3, now_s=now_s) == ("a",) * 3
        for key in keys:
            fleet = ordered(fleet, key, "a", now_s=now_s)
        for late, key in enumerate(keys):
            assert fleet.history("a").troubles == number + bool(late)
            fleet = lose(fleet, key, now_s=now_s + 20.0 + late)
    assert fleet.history("a").banned


def test_starts_that_overlap_for_ever_are_counted_too() -> None:
    fleet = Fleet(limits=limits(wanted=2, rest_s=0.0))
    for number in range(4 * MOST_TROUBLES):
        fleet = ordered(fleet, f"node-{number}", "a", now_s=10.0 * number)
        if number:
            fleet = lose(fleet, f"node-{number - 1}", now_s=10.0 * number + 5.0)
    assert fleet.history("a").banned


def test_room_that_somebody_else_took_says_nothing_about_the_machine() -> None:
    fleet = taken(ordered(running("a", wanted=2), "node-1", "b", now_s=1.0), "node-1")
    assert starts(fleet, machines("b"), count=1, now_s=1.0) == ("b",)


def test_two_runs_do_not_prefer_the_same_machines() -> None:
    names = [f"m{i}" for i in range(16)]
    chosen = {
        starts(Fleet(limits=limits(wanted=1, salt=run)), machines(*names), count=1, now_s=0.0)
        for run in ("run-1", "run-2", "run-3", "run-4")
    }
    assert len(chosen) > 1


@given(
    rooms=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    wanted=st.integers(1, 8),
    most=st.none() | st.integers(1, 10),
    play=st.lists(
        st.tuples(
            st.sampled_from(["up", "die", "silent", "fail", "taken", "ends"]), st.integers(0, 7)
        ),
        max_size=60,
    ),
)
def test_never_too_many_never_where_there_is_no_room_and_never_on_a_banned_machine(
    rooms: list[int], wanted: int, most: int | None, play: list[tuple[str, int]]
) -> None:
    fleet, count, now = Fleet(limits=limits(wanted=wanted, most=most)), 0, 0.0
    for what, pick in play:
        now += 1.0
        used = Counter(p.machine for p in fleet.nodes.values())
        seen = [Machine(id=str(i), room=max(0, r - used[str(i)])) for i, r in enumerate(rooms)]
        chosen = starts(fleet, seen, count=fleet.missing, now_s=now)
        assert len(chosen) <= fleet.missing
        usable = sum(
            max(0, m.room - fleet.history(m.id).gone)
            for m in seen
            if not fleet.history(m.id).banned and fleet.history(m.id).rests_until_s <= now
        )
        assert len(chosen) == min(fleet.missing, usable), "a machine idles while nodes are missing"
        for machine in chosen:
            assert not fleet.history(machine).banned
            fleet = ordered(fleet, f"node-{count}", machine, now_s=now)
            count += 1
        assert len(fleet.nodes) <= min(wanted, most or wanted)
        for id, number in Counter(p.machine for p in fleet.nodes.values()).items():
            assert number <= rooms[int(id)]
        keys = sorted(fleet.nodes)
        if not keys:
            continue
        key = keys[pick % len(keys)]
        if what == "up":
            fleet = came_up(fleet, key, now_s=now)
        elif what == "taken":
            fleet = taken(fleet, key)
        else:
            fleet = ends_machine(fleet, key) if what == "ends" else fleet
            fleet, _ = gone(fleet, key, cause=what, now_s=now, is_silent=what == "silent")


def test_a_hold_makes_room_only_where_a_place_was_given_up() -> None:
    run = Fleet(limits=limits(wanted=3))
    assert held(run, needed=0) == run
    more = held(run, needed=1)
    assert more.histories == {} and more.limits.wanted == 3
    given_up = replace(run, histories={"b": History(gone=1), "c": History(gone=2)})
    assert held(given_up, needed=1).histories == {"b": History(gone=0), "c": History(gone=2)}

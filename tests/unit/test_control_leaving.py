"""Nodes that say beforehand that they go: nothing of theirs is lost, and they are let go."""

from __future__ import annotations

from control_desk import EXPERTS, Desk, running

from lazarus.control.cluster.state import Phase
from lazarus.control.messages import (
    Depart,
    KillNode,
    LeaveRequest,
    NodeEndsMachine,
    NodeNotice,
    Pause,
    Prepare,
)
from lazarus.control.ports import DriverSaid, Tell, TellDriver


def farewells(desk: Desk) -> list[tuple[str, str]]:
    told = [c for c in desk.of(Tell) if isinstance(c.body, Depart)]
    return [(c.worker, c.body.reason) for c in told]


def test_a_node_that_leaves_hands_its_experts_over_and_is_let_go() -> None:
    desk = running(nodes=4, slots_per_node=2)
    desk.say("w1", LeaveRequest(generation=1, cause="maintenance", notice_s=60.0))
    desk.say("w1", LeaveRequest(generation=1))  # said twice, it is one
    (event,) = desk.events("drain_notice")
    assert (event["node"], event["cause"], event["notice_s"]) == (1, "maintenance", 60.0)
    assert len([c for c in desk.of(TellDriver) if isinstance(c.body, NodeEndsMachine)]) == 1
    assert desk.state.phase is Phase.RUNNING and desk.told(Pause)
    desk.pause()
    order = desk.told(Prepare)[-1]
    assert [seat.worker for seat in order.seats] == ["w0", "w2", "w3"]
    assert [seat.worker for seat in order.feeders] == ["w0", "w2", "w3", "w1"]
    assert farewells(desk) == [("w1", "left the run")]
    assert [event["node"] for event in desk.events("node_left")] == [1]
    assert (desk.state.standing.members, sorted(desk.state.roster.nodes)) == ((0, 2, 3), [0, 2, 3])
    assert {e for w in desk.state.standing.seats for e in desk.held[w]} == set(range(EXPERTS))
    assert not desk.events("node_lost") and not desk.events("expert_restored")


def test_an_expert_that_only_the_leaving_node_holds_comes_from_it() -> None:
    desk = running(nodes=4, slots_per_node=1, min_replicas=1)
    held = [expert for worker in desk.state.standing.seats for expert in desk.held[worker]]
    leaver = next(w for w in desk.state.standing.seats if held.count(desk.held[w][0]) == 1)
    desk.say(leaver, LeaveRequest(generation=1))
    desk.pause()
    moves = desk.told(Prepare)[-1].moves
    assert desk.held[leaver][0] in {move.expert for move in moves if move.source == 3}
    assert {e for w in desk.state.standing.seats for e in desk.held[w]} == set(range(EXPERTS))
    assert not desk.events("expert_restored")


def test_the_clusters_notice_of_a_node_that_is_on_its_way_is_kept_for_it() -> None:
    desk = running(nodes=3, join_debounce_s=0.0)
    notice = NodeNotice(node_key="n3", cause="drain", notice_s=30.0)
    desk.feed(DriverSaid(body=notice, at_s=desk.now_s))
    assert not desk.events("drain_notice")
    desk.join("w3")
    assert [e["node"] for e in desk.events("drain_notice")] == [3]
    desk.tick(5.0)
    assert not desk.told(Pause)  # who goes again is not taken in


def test_a_joiner_may_take_the_place_of_a_node_that_leaves() -> None:
    desk = running(nodes=3, max_nodes=3, join_debounce_s=0.0, slots_per_node=2, min_replicas=2)
    desk.join("w3", "w4")
    desk.tick()
    assert not desk.told(Pause)
    desk.say("w1", LeaveRequest(generation=1))
    desk.pause()
    assert desk.state.standing.members == (0, 2, 3)
    assert [event["node"] for event in desk.events("node_joined")] == [3]


def test_a_node_that_dies_before_it_was_taken_in_costs_nobody_anything() -> None:
    desk = running(nodes=3, join_debounce_s=60.0)
    desk.join("w3")
    desk.lose("w3")
    assert (desk.state.phase, desk.state.generation) == (Phase.RUNNING, 1)
    assert sorted(desk.state.roster.nodes) == [0, 1, 2] and not desk.events("node_lost")
    killed = [c.body for c in desk.of(TellDriver) if isinstance(c.body, KillNode)]
    assert [body.node_key for body in killed] == ["n3"]


def test_a_loss_takes_waiting_nodes_in_only_where_too_few_are_left() -> None:
    """Whoever has to be given all state would keep the recovery waiting."""
    options = {"nodes": 4, "join_debounce_s": 60.0, "slots_per_node": 3, "min_replicas": 3}
    desk = running(min_nodes=3, **options)
    desk.join("w4")
    desk.lose("w3")
    assert (desk.state.phase, desk.state.standing.members) == (Phase.RUNNING, (0, 1, 2))
    desk.lose("w2")
    assert (desk.state.phase, desk.state.standing.members) == (Phase.RUNNING, (0, 1, 4))

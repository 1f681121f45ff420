"""Where the time of a recovery went: each phase on record, and nothing counted twice."""

from __future__ import annotations

from control_desk import Desk, running

from lazarus.control.cluster.state import Phase
from lazarus.control.messages import Align, Fence, Injected, Prepare, Ready
from lazarus.control.ports import DriverSaid

REPLICATED = {"slots_per_node": 2, "min_replicas": 2}  # one loss leaves every expert alive


def slow() -> Desk:
    """A run whose workers answer only where a test lets them."""
    desk = running(**REPLICATED)
    desk.deaf |= {"Fence", "Align", "Prepare"}
    return desk


def ready(desk: Desk, *, groups_s: tuple[float, ...], transfer_s: float) -> None:
    """All are ready, after some seconds for groups and copies."""
    transition = desk.state.transition
    assert transition is not None and transition.plan is not None
    for order in desk.told(Prepare):
        if order.generation == transition.generation:
            for worker, rank_s in zip(("w0", "w1"), groups_s, strict=True):
                desk.plans[worker] = transition.plan
                digest = transition.plan.digest
                more = {"groups_s": rank_s, "transfer_s": transfer_s}
                desk.say(worker, Ready(generation=order.generation, plan_digest=digest, **more))
            return


def test_each_phase_of_a_recovery_has_its_seconds() -> None:
    desk = slow()
    body = Injected(kind="kill", node_key="n2", spec="chaos:kill")
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    desk.now_s += 3.0
    desk.lose("w2")
    desk.now_s += 1.0
    desk.answer(Fence)
    desk.now_s += 2.0
    desk.answer(Align)
    desk.now_s += 4.0
    ready(desk, groups_s=(0.5, 1.5), transfer_s=0.25)
    assert desk.state.phase is Phase.RUNNING
    desk.now_s += 8.0
    desk.commit(9)
    event = desk.events("reconfigured")[-1]
    assert event["phases"] == {
        "detect": 3.0,
        "release": 1.0,
        "align": 2.0,
        "plan": 2.25,
        "groups": 1.5,
        "transfer": 0.25,
        "redo": 8.0,
    }
    assert event["wall_s"] == 18.0
    assert (event["reason"], event["lost"], event["joined"]) == ("node_lost", [2], [])
    assert (event["attempts"], event["num_nodes"], event["step"]) == (1, 2, 8)


def test_attempts_of_one_recovery_add_up() -> None:
    desk = running(nodes=4, slots_per_node=3, min_replicas=3)
    desk.deaf |= {"Fence"}
    desk.lose("w3")
    desk.now_s += 1.0
    desk.answer(Fence)
    desk.deaf |= {"Align"}
    desk.lose("w2")  # its loss came before the commit of the step that is done again
    desk.now_s += 2.0
    desk.answer(Align)
    desk.commit(9)
    event = desk.events("reconfigured")[-1]
    assert event["attempts"] == 2 and event["lost"] == [3, 2]
    assert event["phases"]["release"] == 1.0 and event["phases"]["align"] == 2.0


def test_a_recovery_ends_with_its_first_commit() -> None:
    desk = running(**REPLICATED)
    desk.lose("w2")
    assert not [e for e in desk.events("reconfigured") if e["reason"] == "node_lost"]
    for step in (9, 10):
        desk.commit(step)
    assert len([e for e in desk.events("reconfigured") if e["reason"] == "node_lost"]) == 1

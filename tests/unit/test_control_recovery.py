"""Verdict, needs, moves, slots and the base of a plan, case by case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from control_desk import running
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.cluster.transition import Transition
from lazarus.control.messages import Align, Aligned, DriverHello, Fence, Held, Report, Seat, Vector
from lazarus.control.parts.roster import Node, Roster
from lazarus.control.parts.standing import Standing
from lazarus.control.plans.planning import plan_for
from lazarus.control.plans.verdict import (
    Verdict,
    aligned_alike,
    holders,
    needs,
    schedule_moves,
    slots_for,
    verdict,
)
from lazarus.control.ports import Tell, TellAll, TellDriver, each
from lazarus.control.vector import start_history
from lazarus.errors import BrokenInvariantError
from placement import PlacementRequest, Plan, plan, replan


def vector(step: int) -> Vector:
    return Vector(generation=1, step=step, lanes=b"x")


def report(committed: int, prepared: int, *vectors: Vector) -> Report:
    return Report(generation=2, committed=committed, prepared=prepared, vectors=vectors)


def test_nobody_decided_so_the_step_is_redone() -> None:
    reports = {"a": report(4, 5), "b": report(4, 4)}
    assert verdict(reports, known={}, published=4) == Verdict(step=4)


def test_one_member_decided_so_all_commit_with_its_vector() -> None:
    reports = {"a": report(5, 5, vector(5)), "b": report(4, 5)}
    assert verdict(reports, known={}, published=4) == Verdict(step=5, vector=vector(5))


def test_a_vector_of_a_dead_rank_commits_the_step() -> None:
    reports = {"a": report(4, 5), "b": report(4, 5)}
    assert verdict(reports, known={5: vector(5)}, published=4).step == 5


def test_a_published_step_is_never_redone() -> None:
    reports = {"a": report(4, 5), "b": report(4, 5)}
    assert verdict(reports, known={5: vector(5)}, published=5).step == 5
    with pytest.raises(BrokenInvariantError, match="nobody kept its vector"):
        verdict(reports, known={}, published=5)


@pytest.mark.parametrize(("generation", "step"), [(1, 8), (2, 9)])
def test_a_vector_of_an_attempt_that_is_over_commits_nothing(generation: int, step: int) -> None:
    """A vector of the attempt that was going on does commit its step."""
    desk = running(nodes=4, slots_per_node=2, min_replicas=2)
    desk.lose("w3")
    said = changed(desk.vector(9), generation=generation)
    desk.deaf.add("Fence")
    desk.lose("w2")
    for worker in ("w0", "w1"):
        more = {"prepared": 9, "entered": 2, "vectors": (said,)}
        desk.say(worker, Report(generation=3, committed=8, **more))
    assert desk.state.rejected.num_refused == 0
    assert {body.step for body in desk.told(Align) if body.generation == 3} == {step}


@pytest.mark.parametrize("late", [report(3, 4), report(4, 4), report(3, 5)])
def test_a_member_that_cannot_follow_is_a_broken_invariant(late: Report) -> None:
    reports = {"a": report(5, 5, vector(5)), "b": late}
    with pytest.raises(BrokenInvariantError, match="b stands at"):
        verdict(reports, known={}, published=4)


@given(
    decided=st.booleans(), received=st.booleans(), behind=st.integers(1, 4), step=st.integers(1, 99)
)
def test_the_verdict_is_commit_exactly_where_evidence_exists(
    decided: bool, received: bool, behind: int, step: int
) -> None:
    reports = {f"w{i}": report(step - 1, step) for i in range(behind)}
    if decided:
        reports["z"] = report(step, step, vector(step))
    known = {step: vector(step)} if received else {}
    found = verdict(reports, known=known, published=step - 1)
    assert found.step == (step if decided or received else step - 1)
    assert (found.vector is not None) == (found.step == step)


@pytest.mark.parametrize("field", ["step", "dense_digest", "history_digest", "num_experts"])
def test_ranks_that_differ_are_named(field: str) -> None:
    base: dict[str, Any] = {"generation": 1, "step": 3, "num_layers": 1, "num_experts": 4}
    other = {**base, field: 7 if field in base else "odd"}
    aligned = {"a": Aligned(**base), "b": Aligned(**base), "c": Aligned(**other)}
    assert aligned_alike({"a": aligned["a"], "b": aligned["b"]}) == ""
    assert aligned_alike(aligned) == f"{field} differs on c"


def test_moves_heal_every_need_from_a_holder_rarest_first() -> None:
    wanted = {(0, e): [0, 1, 2] for e in range(4)}
    owners = {(0, 0): [0], (0, 1): [0, 1], (0, 2): [0, 1, 2]}
    moves, lost = schedule_moves(wanted, owners)
    assert lost == ((0, 3),)
    assert [m.expert for m in moves] == [0, 0, 1]
    for move in moves:
        assert move.source in owners[(move.layer, move.expert)]
        assert move.target not in owners[(move.layer, move.expert)]


@given(data=st.data(), ranks=st.integers(1, 6), experts=st.integers(1, 8))
def test_after_the_moves_everybody_holds_what_the_plan_gives_it(
    data: st.DataObject, ranks: int, experts: int
) -> None:
    some = st.sets(st.integers(0, ranks - 1))
    wanted = {(0, e): sorted(data.draw(some)) for e in range(experts)}
    owners = {(0, e): sorted(data.draw(some)) for e in range(experts)}
    moves, lost = schedule_moves(wanted, owners)
    have = {e: set(at) for e, at in owners.items()}
    for move in moves:
        assert move.source in owners[(move.layer, move.expert)]
        have[(move.layer, move.expert)].add(move.target)
    for expert, at in wanted.items():
        assert set(at) <= have[expert] or expert in lost
    assert set(lost) == {e for e in wanted if not owners[e]}


def test_senders_share_the_work() -> None:
    wanted = {(0, e): [0, 1, 2] for e in range(6)}
    owners = {(0, e): [0, 1] for e in range(6)}
    moves, _ = schedule_moves(wanted, owners)
    assert {source: sum(m.source == source for m in moves) for source in (0, 1)} == {0: 3, 1: 3}


def test_an_order_for_all_spells_out_to_one_for_each() -> None:
    fence, hello = Fence(generation=2), TellDriver(body=DriverHello(run=""))
    told = (hello, TellAll(workers=("a", "b"), body=fence), Tell(worker="c", body=fence))
    assert each(told) == (hello, *(Tell(worker=w, body=fence) for w in "abc"))


def test_holders_and_needs_read_the_plan() -> None:
    seats = tuple(Seat(worker=f"w{i}", node=i) for i in range(3))
    made = plan(PlacementRequest(load=np.ones(4), num_nodes=3, slots_per_node=3))
    wanted = needs(made, num_seats=3)
    assert all(len(at) >= 2 for at in wanted.values())
    aligned = {}
    for rank, seat in enumerate(seats):
        experts = tuple(int(e) for e in made.expert_of_slot[0, rank] if e >= 0)
        held = (Held(layer=0, experts=experts),)
        aligned[seat.worker] = Aligned(generation=1, step=0, held=held)
    assert holders(aligned, seats) == wanted
    one = Aligned(generation=1, step=0, held=(Held(layer=0, experts=(3, 1)),))
    seats += (Seat(worker="w3", node=3), Seat(worker="silent", node=4), Seat(worker="w5", node=5))
    aligned |= {"w3": one, "w5": one}  # two answers in one object
    more = {
        expert: [*at, *([3, 5] if expert[1] in (1, 3) else [])] for expert, at in wanted.items()
    }
    assert holders(aligned, seats) == more
    assert holders({}, seats) == {}


def slots(nodes: int, *, configured: int | None = None) -> int:
    return slots_for(
        num_nodes=nodes,
        num_experts=6,
        configured=configured,
        started_nodes=5,
        min_replicas=2,
        spare_losses=2,
    )


def test_automatic_slots_leave_no_expert_homeless() -> None:
    assert slots(5) == slots(3) == 4
    assert slots(1) == 6
    for nodes in range(1, 8):
        assert nodes * slots(nodes) >= 6
    assert slots(1, configured=3) == 3


def test_a_plan_grows_from_the_plan_of_the_last_committed_step() -> None:
    """Rule 22: a plan that was resumed, but never committed a step, leaves no trace."""
    bases: list[Plan | None] = []

    def policy(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
        bases.append(previous)
        return replan(request, previous=previous, lost=lost)

    committed = plan(PlacementRequest(load=np.ones(6), num_nodes=3, slots_per_node=4))
    resumed = plan(PlacementRequest(load=np.ones(6), num_nodes=4, slots_per_node=3))
    state = Control(
        config=ControlConfig(steps=9, nodes=3, placement=policy),
        roster=Roster(nodes={node: Node(key=f"n{node}", workers=("w",)) for node in range(3)}),
        standing=Standing(plan=resumed, base_plan=committed),
    )
    history = start_history(1, 6).astype("<f8").tobytes()
    aligned = Aligned(generation=5, step=2, num_layers=1, num_experts=6, history=history)
    transition = Transition(
        generation=5,
        voters=(0, 1, 2),
        joiners=(),
        leavers=(),
        phase_s=0.0,
        aligned={"a": aligned},
    )
    plan_for(state, transition)
    assert bases == [committed]

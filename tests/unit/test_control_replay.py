"""A restarted controller: what its journal tells, and whom it believes (rules 35 to 38)."""

from __future__ import annotations

import json

import pytest
from control_desk import running
from control_journal import resumed_state
from control_play import play
from control_world import World, alike

from lazarus.control import machine
from lazarus.control.cluster.state import Control, Phase, fields_of
from lazarus.control.messages import Fence, Fenced, Heartbeat, Hello, Welcome
from lazarus.control.ports import Journal, Tell, Tick, WorkerSaid
from lazarus.control.restart.folded import folded_text, unfolded
from lazarus.control.restart.replay import blank_state, missing_commits, replayed


@pytest.fixture(scope="module")
def world() -> World:
    return play(3, faults=(), nodes=3, steps=4)


def hello(name: str, *, generation: int, fence: int, at_s: float = 100.0) -> WorkerSaid:
    body = Hello(
        worker=f"{name}.0", node_key=name, term=1, generation=generation, fence=fence, committed=4
    )
    return WorkerSaid(worker=body.worker, body=body, at_s=at_s)


def key_of(world: World, serial: int) -> str:
    return next(str(e["key"]) for e in world.entries if e.get("node") == serial)


def restarted(world: World, *more: dict[str, object]) -> Control:
    return resumed_state([*world.entries, *more], world.config, now_s=100.0)


def test_the_journal_alone_gives_members_plan_lineage_and_step(world: World) -> None:
    state = restarted(world)
    assert state.phase is Phase.RECONNECTING
    assert (state.standing.members, state.step, state.term) == ((0, 1, 2), 4, 2)
    assert state.standing.lineage == ((1, 0),)
    assert state.standing.plan is not None and state.standing.base_plan is not None
    assert state.committed.newest is not None and state.committed.newest.step == 4


def test_an_undisturbed_generation_is_adopted(world: World) -> None:
    state, told = restarted(world), []
    for name in ("node-0", "node-1", "node-2"):
        state, commands = machine.decide(state, hello(name, generation=1, fence=1))
        told += [c.body for c in commands if isinstance(c, Tell)]
    assert state.phase is Phase.RUNNING and state.resumed == 1
    assert all(isinstance(body, Welcome) for body in told)


def test_one_fenced_member_means_the_next_generation(world: World) -> None:
    state, told = restarted(world), []
    for name, fence in (("node-0", 1), ("node-1", 2), ("node-2", 1)):
        state, commands = machine.decide(state, hello(name, generation=1, fence=fence))
        told += [c.body for c in commands if isinstance(c, Tell)]
    assert state.phase is Phase.FENCING
    assert [b.generation for b in told if isinstance(b, Fence)] == [2, 2, 2]


def test_the_next_claim_is_above_every_journaled_one(world: World) -> None:
    claim: dict[str, object] = {"kind": "claim", "generation": 7, "members": [0, 1, 2]}
    assert restarted(world, claim).generation == 7


def test_whom_the_newest_claim_left_out_stays_out(world: World) -> None:
    claim: dict[str, object] = {"kind": "claim", "generation": 2, "members": [0, 1]}
    state = restarted(world, claim)
    assert state.standing.members == (0, 1)
    state, commands = machine.decide(state, hello(key_of(world, 2), generation=1, fence=1))
    assert isinstance(commands[0], Tell) and isinstance(commands[0].body, Fenced)
    assert not state.roster.workers


def test_a_member_that_does_not_come_back_is_lost(world: World) -> None:
    state = restarted(world)
    for serial in (0, 1):
        state, _ = machine.decide(
            state, hello(key_of(world, serial), generation=1, fence=1, at_s=100.5)
        )
    assert state.phase is Phase.RECONNECTING
    late = 100.5 + world.config.timeouts.reconnect_s + 0.1
    for serial in (0, 1):
        beat = Heartbeat(generation=1, step=4)
        said = WorkerSaid(worker=f"{key_of(world, serial)}.0", body=beat, at_s=late - 0.2)
        state, _ = machine.decide(state, said)
    assert state.standing.members == (0, 1, 2)
    for _ in range(2):
        state, _ = machine.decide(state, Tick(at_s=late))
    assert state.phase is Phase.FENCING and state.standing.members == (0, 1)


def test_what_kept_everybody_away_costs_nobody(world: World) -> None:
    """A4: on a busy machine the first hello may come late, and the others right behind it."""
    state, late = restarted(world), 100.0 + 3 * world.config.timeouts.reconnect_s
    for number, serial in enumerate((0, 1, 2)):
        at_s = late + number * world.config.timeouts.reconnect_s / 3
        said = hello(key_of(world, serial), generation=1, fence=1, at_s=at_s)
        state, _ = machine.decide(state, said)
    assert state.phase is Phase.RUNNING and state.standing.members == (0, 1, 2)


def test_one_that_comes_back_again_and_again_holds_nobody_up_for_ever(world: World) -> None:
    state, config = restarted(world), world.config
    at_s = 100.0
    while state.phase is Phase.RECONNECTING:
        at_s += config.timeouts.reconnect_s / 2
        said = hello(key_of(world, 0), generation=1, fence=1, at_s=at_s)
        state, _ = machine.decide(state, said)
    assert at_s <= 100.0 + config.timeouts.comeback_s + 2 * config.timeouts.reconnect_s
    assert state.standing.members == (0,)


def test_where_nobody_came_back_the_wait_is_longer(world: World) -> None:
    """Without them the run is over; a machine that is busy starting things is slow to answer."""
    state, _ = machine.decide(
        restarted(world), Tick(at_s=100.0 + world.config.timeouts.reconnect_s + 0.1)
    )
    assert state.phase is Phase.RECONNECTING and state.standing.members == (0, 1, 2)
    for _ in range(2):
        state, _ = machine.decide(state, Tick(at_s=100.0 + world.config.timeouts.comeback_s + 0.1))
    assert state.phase is Phase.HOLDING and not state.standing.members and state.step == 4


def test_commits_that_were_journaled_but_not_said_are_said(world: World) -> None:
    base = blank_state(world.config)
    found = missing_commits(world.entries, base, said=lambda name, generation, step: step <= 2)
    steps = [p.fields["step"] for p in found if p.event == "step_committed"]
    assert steps == [3, 4]


def test_a_step_that_was_said_of_a_generation_rolled_back_is_said_of_the_next(world: World) -> None:
    base = blank_state(world.config)
    found = missing_commits(world.entries, base, said=lambda name, generation, step: generation > 1)
    assert [p.fields["step"] for p in found if p.event == "step_committed"] == [1, 2, 3, 4]


def test_a_folded_state_is_written_and_read_as_it_was(world: World) -> None:
    state = blank_state(world.config)
    for entry in world.entries:
        state = replayed(state, entry)
    again = unfolded(json.loads(folded_text(state, known={})), world.config)
    assert again.standing.plan is not None and again.standing.plan is again.standing.base_plan
    assert all(alike(again, state, name) for name in fields_of(state))
    assert (
        again.committed.history.any()
        and again.standing.lineage
        and again.standing.seats
        and again.committed.newest
    )


@pytest.mark.parametrize(
    "data",
    [
        {"step": {"~": "Popen", "v": ["true"]}},
        {"nodes": {"~": "map", "v": 3}},
        {"nowhere": 1},
        {"history": {"~": "array", "of": "<f8", "shape": [7], "v": "AAAA"}},
    ],
)
def test_what_is_no_folded_state_is_refused(world: World, data: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        unfolded(data, world.config)


def test_the_journal_gives_the_plan_of_the_last_committed_step() -> None:
    """Two losses before the next commit: what is held is still what that plan gave out."""
    desk = running(nodes=4, slots_per_node=3, min_replicas=3)
    committed = desk.state.standing.plan
    desk.lose("w3")
    desk.lose("w2")
    assert committed is not None and desk.state.standing.plan is not None
    assert desk.state.standing.plan.digest != committed.digest
    again = resumed_state([c.entry for c in desk.of(Journal)], desk.state.config, now_s=0.0)
    for state in (desk.state, again):
        assert (
            state.standing.base_plan is not None
            and state.standing.base_plan.digest == committed.digest
        )

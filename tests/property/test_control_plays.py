"""``decide`` under random plays: every event has an answer and no invariant of the protocol breaks.

Each play is one run of simulated workers around the real machine, ledger and journal replay (see
``tests/support/control_world.py``). ``test_control_rules.py`` proves that the plays can fail.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from control_play import FAULTS, config_of, play
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarus.control import machine
from lazarus.control.cluster.state import Control
from lazarus.control.messages import (
    Aligned,
    Heartbeat,
    Hello,
    LeaveRequest,
    Paused,
    Ready,
    Report,
    Suspicion,
    UserError,
)
from lazarus.control.ports import Journal, StreamClosed, Tick, WorkerSaid


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    nodes=st.integers(2, 5),
    num_faults=st.integers(0, 6),
    min_nodes=st.integers(1, 2),
    faults=st.sets(st.sampled_from(FAULTS), min_size=1).map(sorted),
)
def test_no_interleaving_of_faults_breaks_an_invariant(
    seed: int, nodes: int, num_faults: int, min_nodes: int, faults: list[str]
) -> None:
    play(seed, nodes=nodes, num_faults=num_faults, min_nodes=min_nodes, faults=faults)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=1500)
@given(seed=st.integers(0, 2**32), num_faults=st.integers(0, 10), min_nodes=st.integers(1, 3))
def test_no_long_play_breaks_an_invariant(seed: int, num_faults: int, min_nodes: int) -> None:
    play(seed, num_faults=num_faults, turns=600, min_nodes=min_nodes)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), nodes=st.integers(3, 5), flips=st.integers(1, 2))
def test_silent_corruption_never_spreads_whatever_else_happens(
    seed: int, nodes: int, flips: int
) -> None:
    """I5 and I12 hold with copies that are wrong: what is outvoted is repaired, never a source."""
    faults = ("kill", "leave", "join", "controller", "link")
    play(seed, nodes=nodes, num_faults=4, faults=faults, flips=flips)


def test_flips_are_seen_and_repaired_in_plays() -> None:
    seen = repaired = 0
    for seed in range(12):
        world = play(seed, nodes=4, num_faults=3, faults=("leave", "join"), flips=1)
        assert world.over is not None and world.over.status == "finished"
        names = [p.event for p in world.published]
        seen += "replica_mismatch" in names
        repaired += "replica_repaired" in names
    assert seen >= 4 and repaired >= 3


def test_an_undisturbed_run_has_one_generation_and_all_its_steps() -> None:
    world = play(1, faults=(), steps=5)
    assert world.state.generation == 1
    assert [p.fields["step"] for p in world.commits()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_survived_alone_and_leaves_its_trace(kind: str) -> None:
    beside = () if kind in ("sniper", "witness") else ("join",)
    worlds = [play(s, faults=(kind, *beside), num_faults=3, turns=200) for s in range(6)]
    statuses = {world.over.status for world in worlds if world.over}
    assert statuses == {"finished"}
    if kind in ("controller", "torn"):
        assert any(world.state.term > 1 for world in worlds)
    else:
        assert any(world.state.generation > 1 for world in worlds)


def test_a_run_whose_nodes_are_all_gone_goes_on_from_what_is_stored() -> None:
    worlds = [play(s, faults=("everybody", "persist"), num_faults=4, turns=400) for s in range(20)]
    restarts = [p for w in worlds for p in w.published if p.event == "run_restarted"]
    assert any(p.fields["step"] == 0 and p.fields["checkpoint"] == "" for p in restarts)
    assert any(p.fields["step"] > 0 and p.fields["checkpoint"] == "/ckpt" for p in restarts)
    assert any(p.fields["step"] < p.fields["from_step"] for p in restarts)
    assert all(w.over is not None and w.over.status == "finished" for w in worlds)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_no_event_however_odd_raises(seed: int) -> None:
    """Workers that break the protocol: any body, from anybody, in any state."""
    rng = Random(seed)
    state = Control(config=config_of(nodes=2, steps=3))
    names = ["a.0", "b.0", "c.0", "nobody.0"]
    for turn in range(80):
        at_s = turn * 0.1
        name = rng.choice(names)
        event: Any = WorkerSaid(worker=name, body=odd_body(rng, state, name), at_s=at_s)
        if rng.random() < 0.25:
            event = rng.choice([Tick(at_s=at_s), StreamClosed(worker=name, at_s=at_s)])
        before = state
        state, commands = machine.decide(state, event)
        assert state.generation >= before.generation
        journaled = [c.entry for c in commands if isinstance(c, Journal)]
        claims = [e["generation"] for e in journaled if e["kind"] == "claim"]
        assert all(g > before.generation for g in claims) and len(claims) == len(set(claims))


def odd_body(rng: Random, state: Control, name: str) -> Any:
    generation = rng.choice([state.generation, state.resumed, rng.randrange(4)])
    step = rng.randrange(4)
    plan = state.transition.plan if state.transition else None
    digest = rng.choice(["x", plan.digest if plan else "none"])
    return rng.choice(
        [
            Hello(worker=name, node_key=name[:-2], generation=rng.choice([0, generation])),
            Heartbeat(generation=generation, step=step, waiting=rng.random() < 0.5),
            Report(generation=generation, committed=step, prepared=step),
            Aligned(
                generation=generation,
                step=step,
                num_layers=1,
                num_experts=2,
                history=bytes(48),
            ),
            Ready(generation=generation, plan_digest=digest),
            Paused(generation=generation, step=step),
            Suspicion(generation=generation, step=step),
            LeaveRequest(generation=generation),
            UserError(generation=generation, step=step),
        ]
    )

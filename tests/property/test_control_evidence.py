"""What a controller holds against nodes is the same after its restart: fold of replay = live state.

Random scripts of silent corruption, faults on purpose, errors of our own, losses and commits; after
every event the journal, cut and folded anywhere, tells what the living controller knows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

from control_desk import EXPERTS, Flipped, journal_of
from control_journal import resumed_state
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarus.control.cluster import evidence
from lazarus.control.cluster.state import Control, Phase, fields_of
from lazarus.control.messages import (
    FaultFired,
    Hello,
    Injected,
    Prepare,
    Repaired,
    ReplicaMismatch,
    UserError,
    WorkerDied,
)
from lazarus.control.ports import DriverSaid, WorkerSaid
from lazarus.control.restart.folded import folded_text, unfolded
from lazarus.control.restart.replay import blank_state, replayed
from lazarus.failure import Cause


def desk(*, nodes: int = 5, **config: Any) -> Flipped:
    made = Flipped(nodes=nodes, slots_per_node=EXPERTS, **config)
    assert made.state.phase is Phase.RUNNING
    made.commit(1)
    return made


def act(made: Flipped, kind: str, rng: Random) -> None:
    """One event, or a few, at a run that goes on."""
    state, config = made.state, made.state.config
    worker = rng.choice(sorted(state.roster.workers))
    node = state.roster.workers[worker].node
    if kind in ("kill", "stop", "crash", "leave"):
        body = Injected(kind=kind, node_key=state.roster.nodes[node].key, spec=f"chaos:{kind}")
        made.feed(DriverSaid(body=body, at_s=made.now_s))
    match kind:
        case "commit" if state.phase is Phase.RUNNING and state.step < config.steps:
            made.commit(state.step + 1)
        case "lose":
            made.lose(worker)
        case "dense":
            made.bad_dense = (worker,) if rng.random() < 0.7 else ()
        case "expert":
            made.bad_expert = (worker,) if rng.random() < 0.7 else ()
        case "repaired":
            ranks = (rng.randrange(len(state.standing.seats) or 1),)
            fields: dict[str, Any] = {"layer": 0, "expert": 1, "ranks": ranks}
            made.say(worker, Repaired(generation=state.resumed, step=state.step, **fields))
        case "odd":
            what = '{"layer": -1, "expert": -1, "what": "x", "majority": false}'
            made.say(worker, ReplicaMismatch(generation=state.resumed, step=state.step, what=what))
        case "ours":
            error = {"error": "KeyError: x", "cause": Cause.INTERNAL}
            made.say(worker, UserError(generation=state.resumed, step=state.step + 1, **error))
        case "fault":
            fields = {"kind": "kill", "spec": f"kill@{state.step + 1}", "number": rng.randrange(9)}
            made.say(worker, FaultFired(generation=state.resumed, step=state.step + 1, **fields))
        case "deaf":
            made.deaf = {rng.choice(["Align", "Prepare"])} if rng.random() < 0.5 else set()
        case "wait":
            made.tick()


KINDS = (
    *("commit", "commit", "lose", "dense", "expert", "repaired", "repaired", "odd", "ours"),
    *("fault", "kill", "stop", "crash", "leave", "deaf", "wait"),
)


def odd_ones(live: Control, told: Control) -> list[str]:
    one, other = fields_of(live), fields_of(told)
    return [name for name in evidence.FIELDS if one[name] != other[name]]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), kinds=st.lists(st.sampled_from(KINDS), max_size=40))
def test_the_journal_tells_all_that_is_held_against_nodes(seed: int, kinds: list[str]) -> None:
    rng, made, told = Random(seed), desk(), None
    for kind in kinds:
        if made.state.phase is Phase.ENDED or not made.state.roster.workers:
            break
        act(made, kind, rng)
        entries = journal_of(made)
        cut = rng.randrange(len(entries) + 1)
        told = blank_state(made.state.config)
        for number, entry in enumerate(entries):
            if number == cut:
                told = unfolded(json.loads(folded_text(told, known={})), told.config)
            told = replayed(told, entry)
        if made.state.phase is not Phase.ENDED:
            assert not odd_ones(made.state, told)


def test_scripts_reach_every_field() -> None:
    """The property above would hold of a controller that never finds anything out."""
    seen: set[str] = set()
    for seed in range(300):
        rng, made = Random(seed), desk()
        blank = made.state
        for _ in range(30):
            if made.state.phase is Phase.ENDED or not made.state.roster.workers:
                break
            act(made, rng.choice(KINDS), rng)
            seen |= set(odd_ones(made.state, blank))
        if seen == set(evidence.FIELDS):
            return
    assert seen == set(evidence.FIELDS)


def restarted(made: Flipped, *, but_the_last: int = 0) -> None:
    """Another controller takes over from the journal; everybody who lives comes back."""
    entries = journal_of(made)
    entries = entries[: len(entries) - but_the_last]
    state = resumed_state(entries, made.state.config, now_s=made.now_s)
    alive = sorted(made.state.roster.workers)
    made.state = state
    for worker in alive:
        hello = Hello(
            worker=worker,
            node_key=f"n{worker[1:]}",
            keeper=f"{worker}:1",
            term=state.term - 1,
            generation=made.entered[worker],
            fence=state.generation + 1,  # disturbed: the next generation has to be claimed
            committed=made.committed[worker],
        )
        made.feed(WorkerSaid(worker=worker, body=hello, at_s=made.now_s))


def test_what_is_outvoted_is_no_source_after_a_restart() -> None:
    """Those who outvoted it die together with the controller, before it is repaired."""
    made = desk(nodes=4, on_lost_expert="partial")
    made.bad_expert, made.deaf = ("w0",), {"Prepare"}
    made.lose("w3")
    assert made.state.agreement.outvoted.copies == {("w0", 0, 1)}
    made.deaf = set()
    lost = ("w1", "w2")
    made.state = replace(
        made.state,
        roster=replace(
            made.state.roster,
            workers={w: k for w, k in made.state.roster.workers.items() if w not in lost},
        ),
    )
    restarted(made)
    assert made.state.agreement.outvoted.copies == {("w0", 0, 1)}
    for name in ("n1.0", "n2.0"):
        made.feed(DriverSaid(body=WorkerDied(worker=name, cause="SIGKILL"), at_s=made.now_s))
    assert made.state.phase is Phase.RUNNING and made.state.standing.members == (0,)
    restored = [(r.expert, r.source) for r in made.told(Prepare)[-1].restores]
    assert restored == [(1, "init")], "the copy that is left is not taken for a sound one"


def test_a_repair_is_over_only_with_its_resume() -> None:
    """The controller dies before RESUME is journaled: nothing says that the copy was refilled."""
    made = desk(nodes=4)
    made.bad_expert = ("w0",)
    made.lose("w3")
    assert made.state.phase is Phase.RUNNING and not made.state.agreement.outvoted
    assert made.state.agreement.outvotes == {0: (1,)}
    entries = journal_of(made)
    assert entries[-1]["kind"] == "resume"
    before = resumed_state(entries[:-1], made.state.config, now_s=0.0)
    assert before.agreement.outvoted.copies == {("w0", 0, 1)} and not before.agreement.outvotes
    after = resumed_state(entries, made.state.config, now_s=0.0)
    assert not after.agreement.outvoted and after.agreement.outvotes == {0: (1,)}


def test_a_suspect_is_remembered_with_the_claim_that_leaves_it_out() -> None:
    made = desk(nodes=5)
    fields: dict[str, Any] = {"layer": 0, "expert": 1, "ranks": (2,)}
    for step in (1, 2, 3):
        if step > 1:
            made.commit(step)
        made.say("w0", Repaired(generation=1, step=step, **fields))
    assert made.state.agreement.suspects == ((2, 3),) and 2 not in made.state.standing.members
    entries = journal_of(made)
    (claim,) = [e for e in entries if e["kind"] == "claim" and "suspects" in e.get("evidence", {})]
    assert claim["members"] == [0, 1, 3, 4]
    upto = resumed_state(entries[: entries.index(claim)], made.state.config, now_s=0.0)
    assert not upto.agreement.suspects and 2 in upto.standing.members


def test_a_journal_without_evidence_is_read_as_before() -> None:
    made = desk(nodes=3)
    entries = [e for e in journal_of(made) if e["kind"] != "evidence"]
    for entry in entries:
        entry.pop("evidence", None)
    state = resumed_state(entries, made.state.config, now_s=0.0)
    assert state.step == 1 and not odd_ones(state, blank_state(state.config))

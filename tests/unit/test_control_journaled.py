"""The law of the journal: replayed, it gives the state that the controller had, after any event."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from control_desk import EXPERTS, Desk, Flipped, journal_of, running
from control_journal import resumed_state
from control_world import alike

from lazarus.checkpoint.selection.adaptive import Adapted, SaveSettings
from lazarus.control.cluster import evidence
from lazarus.control.cluster.state import Control, Phase, fields_of, with_fields
from lazarus.control.messages import (
    Evaluated,
    FaultFired,
    Injected,
    LeaveRequest,
    Repaired,
    UserError,
)
from lazarus.control.ports import DriverSaid
from lazarus.control.restart.folded import folded_text
from lazarus.control.restart.replay import blank_state, replayed
from lazarus.failure import Cause

# What a controller that comes back has to know as it was. The rest it asks for, or waits for anew.
KEPT = (
    *("step", "resumed", "generation", "members", "seats", "seat_nodes", "plan", "base_plan"),
    *("lineage", "rolled", "shape", "record_bytes", "top_k", "num_samples", "checkpoints"),
    *("stored", "plt", "doubling", "adapted", "newest", "evaluated", "speeds"),
    *("next_serial", "struck", "fired_specs"),
    *evidence.FIELDS,
)
REPLICATED = {"slots_per_node": 2, "min_replicas": 2}


def told(desk: Desk) -> Control:
    entries = [{"kind": "term", "term": desk.state.term}, *journal_of(desk)]
    return resumed_state(entries, desk.state.config, now_s=desk.now_s)


def check(desk: Desk) -> None:
    again, standing = told(desk), desk.state.standing
    odd = [name for name in KEPT if not alike(again, desk.state, name)]
    assert not odd, odd
    past = {generation: seats for generation, seats in standing.past_seats.items() if generation}
    assert again.standing.past_seats == past
    assert np.array_equal(again.committed.routed, desk.state.committed.routed)
    if desk.state.resumed:
        assert set(again.roster.nodes) == set(desk.state.standing.members)
        assert all(not node.complete for node in again.roster.nodes.values())
        assert again.phase is Phase.RECONNECTING and again.term == desk.state.term + 1


def injected(desk: Desk, kind: str, key: str) -> None:
    desk.feed(DriverSaid(body=Injected(kind=kind, node_key=key, spec=kind), at_s=desk.now_s))


def test_after_losses_joins_leaves_faults_and_evaluations() -> None:
    desk = running(nodes=5, join_debounce_s=0.0, **REPLICATED)
    check(desk)
    desk.say("w0", Evaluated(generation=1, step=8, loss_sum=4.0, count=2.0))
    check(desk)
    fault = FaultFired(generation=1, step=9, kind="slow", spec="slow:*@9", number=1)
    desk.say("w1", fault)
    injected(desk, "crash", "n2")
    injected(desk, "kill", "n4")
    check(desk)
    desk.lose("w4")
    check(desk)
    desk.commit(9)
    desk.lose("w3")
    assert desk.state.standing.plan != desk.state.standing.base_plan
    check(desk)
    desk.commit(10)
    desk.join("w5", "w6")
    desk.tick()
    desk.pause()
    check(desk)
    desk.commit(11)
    desk.say("w0", LeaveRequest(generation=desk.state.resumed, cause="leave"))
    desk.tick()
    desk.pause()
    assert desk.state.standing.members == (1, 2, 5, 6) and len(desk.state.standing.lineage) == 5
    check(desk)


def test_after_checkpoints_restores_and_a_rollback() -> None:
    desk = running(on_lost_expert="partial", partial_checkpoints=True)
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    assert told(desk).saving.ordered == 0  # it is ordered again if its manifest does not stand
    desk.written(8)
    assert told(desk).saving.ordered == desk.state.saving.ordered == 8
    check(desk)
    for step in (9, 10):
        desk.commit(step)
    desk.lose("w2")
    assert desk.events("expert_restored")[0]["lost_copies"] == 16
    assert desk.state.saving.plt.lost_by_expert() and desk.state.saving.doubling
    check(desk)
    desk.commit(11)
    check(desk)
    back = running(on_lost_expert="rollback")
    back.written(4)
    back.lose("w1")
    assert back.state.step == 4 and back.state.standing.rolled == (2, 4)
    check(back)
    back.commit(5)
    check(back)


def test_after_a_rollback_that_takes_back_what_restores_had_lost() -> None:
    desk = running(on_lost_expert="partial")
    desk.written(4)
    desk.lose("w2")
    assert desk.state.saving.plt.lost_by_expert() == {(0, 0): 32}
    both = replace(desk.state.config, on_lost_expert="rollback")
    desk.state = with_fields(desk.state, {"config": both})
    desk.commit(9)
    desk.lose("w1")
    assert desk.state.step == 4 and not desk.state.saving.plt.lost_by_expert()
    check(desk)


def test_after_a_restart_of_the_whole_run_and_before_its_first_step() -> None:
    first = Desk(nodes=2)
    check(first)
    desk = running(**REPLICATED)
    for worker in desk.state.standing.seats:
        desk.share(worker, 8)
    desk.written(8)
    desk.commit(9)
    desk.lose("w0", "w1", "w2")
    desk.join("w3", "w4", "w5")
    assert desk.state.step == 8
    check(desk)
    early = Desk(nodes=2, deaf_at_first=("Prepare",))
    again = told(early)
    assert again.phase is Phase.GATHERING and not again.roster.nodes
    assert (again.roster.next_serial, again.generation, again.resumed) == (2, 1, 0)


def test_after_evidence_of_every_kind() -> None:
    desk = Flipped(nodes=5, slots_per_node=EXPERTS)
    for step in range(1, 9):
        desk.commit(step)
    desk.say("w0", Repaired(generation=1, step=8, ranks=(1,)))
    check(desk)
    body = UserError(generation=1, step=9, error="x", cause=Cause.INTERNAL)
    desk.say("w3", body)
    assert desk.state.blame.raised == ((3, 9),) and desk.state.blame.excused == frozenset()
    check(desk)
    desk.bad_dense, desk.bad_expert, desk.deaf = ("w1",), ("w2",), {"Prepare"}
    desk.lose("w4")
    assert desk.state.agreement.outvoted
    check(desk)
    two = Flipped(nodes=3, slots_per_node=EXPERTS)
    two.commit(1)
    two.written(1)
    two.bad_dense = ("w0",)
    two.lose("w2")
    assert two.state.agreement.ties == (1,) and two.state.standing.rolled == (2, 1)
    check(two)


def test_a_schedule_of_saves_that_was_adapted_is_in_force_again() -> None:
    desk = running(saves=SaveSettings(every=None), **REPLICATED)
    desk.state = with_fields(
        desk.state, {"adapted": Adapted(k_snapshot=3, snapshot_every=5, persist_every=10)}
    )
    desk.lose("w2")
    assert desk.state.saving.adapted == Adapted(k_snapshot=3, snapshot_every=5, persist_every=10)
    check(desk)


def test_weights_of_slow_nodes_are_in_force_again() -> None:
    desk = running(nodes=4, global_batch=64, **REPLICATED)
    for step in range(9, 30):
        desk.commit(step, own_s={1: 0.1})
        if desk.state.pausing.wants == "speed":
            break
    desk.pause()
    assert 0 < desk.state.tuning.speeds[1] < 1
    check(desk)
    assert told(desk).tuning.next_speeds == desk.state.tuning.speeds


def test_evidence_that_did_not_change_is_in_no_entry() -> None:
    desk = running(**REPLICATED)
    before = len(journal_of(desk))
    desk.say("w0", desk.beat())
    assert len(journal_of(desk)) == before
    desk.say("w0", Repaired(generation=1, step=8, ranks=(1,)))
    (entry,) = journal_of(desk)[before:]
    assert entry == {"kind": "evidence", "term": 1, "outvotes": [[1, [8]]]}
    injected(desk, "kill", "n2")
    injected(desk, "crash", "n1")
    entries = journal_of(desk)[before + 1 :]
    assert [sorted(set(e) - {"kind", "term"}) for e in entries] == [["fired"], ["doomed"]]
    assert (entries[0]["fired"][0][0], entries[1]["doomed"]) == (2, [1])
    desk.lose("w2")
    claim = next(e for e in journal_of(desk)[::-1] if e["kind"] == "claim")
    assert claim["evidence"] == {"excused": ["n2"]}


def test_a_field_that_did_not_change_is_not_written_out_again() -> None:
    desk = running(**REPLICATED)
    known: dict[str, Any] = {}
    state = blank_state(desk.state.config)
    for entry in journal_of(desk):
        state = replayed(state, entry)
    whole = folded_text(state, known=known)
    there = {name for name in fields_of(state) if f'"{name}":' in whole}
    assert set(known) == there - {"base_plan"}
    known = {name: (value, f'"{name}!"') for name, value in fields_of(state).items()}
    short = folded_text(state, known=known)
    assert '"plan":"plan!"' in short and '"base_plan":"as plan"' in short
    fresh = replace(state, standing=replace(state.standing, lineage=((1, 0), (2, 8))))
    assert '"lineage":[[1,0],[2,8]]' in folded_text(fresh, known=known)
    assert '"step":"step!"' in short and '"step":8' in whole and "config" not in short
    assert np.array_equal(state.committed.history, desk.state.committed.history)

"""Limits of time just before and just after, and plans and checkpoints at their bounds."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from control_desk import (
    CALM,
    REPLICATED,
    Desk,
    over,
    running,
)

from lazarus.checkpoint.selection.adaptive import Measured, SaveSettings
from lazarus.control.cluster.state import Phase, with_fields
from lazarus.control.membership import members, patience, suspicion
from lazarus.control.messages import (
    FaultFired,
    Go,
    Move,
    Pause,
    Paused,
    Prepare,
    Seat,
    StopRun,
)
from lazarus.control.plans.healing import heals_behind
from lazarus.control.plans.tuning import wanted_weight
from lazarus.control.plans.verdict import SlotMemory, slots_for
from lazarus.control.ports import DriverSaid, Journal
from lazarus.control.reconfiguration import reconfigure
from lazarus.control.saving.adapting import chosen_for
from lazarus.control.saving.losses import checkpoint_awaited
from placement import InfeasiblePlacementError


def test_commits_are_written_down_together_and_no_later_than_the_flush() -> None:
    desk = running(**REPLICATED)
    flush_s = desk.state.config.timeouts.flush_s
    desk.now_s += flush_s
    for step in (9, 10):
        desk.say("w0", desk.vector(step))
    entries = [c.entry for c in desk.of(Journal) if c.entry["kind"] == "commits"]
    assert [c["step"] for c in entries[-1]["commits"]] == [9] and 10 in desk.state.committed.known
    desk.tick(flush_s * 0.9)
    assert desk.state.step == 9
    desk.tick(flush_s * 0.2)
    assert desk.state.step == 10
    count = len(desk.of(Journal))
    desk.say("w0", desk.vector(11))
    assert len(desk.of(Journal)) == count and desk.state.step == 10
    desk.say("w1", desk.vector(11))  # the same, from another rank
    desk.say("w1", desk.vector(8))
    assert desk.state.rejected.stale == 1 and list(desk.state.committed.known) == [11]


@pytest.mark.parametrize(("late_s", "lost"), [(-0.01, False), (0.0, False), (0.01, True)])
def test_a_silent_node_is_lost_just_after_its_limit(late_s: float, lost: bool) -> None:
    state = running(**CALM).state
    limit_s = state.config.timeouts.heartbeat_timeout_s
    at_s = state.roster.workers["w0"].heard_s + limit_s + late_s
    late = members.silent(state, at_s=at_s)
    assert (0 in late) == lost and late == tuple(sorted(late))
    slept = members.excuse(state, slept_s=5.0)
    assert members.silent(slept, at_s=at_s) == ()
    assert slept.phase_s == state.phase_s + 5.0
    assert slept.roster.workers["w1"].progress_s == state.roster.workers["w1"].progress_s + 5.0


def test_a_rank_that_others_wait_for_has_less_time_than_one_alone() -> None:
    desk = running(**CALM)
    timeouts = desk.state.config.timeouts
    short, long = timeouts.no_progress_s, timeouts.standstill_s
    began = desk.state.phase_s

    def stuck(at_s: float, **workers: bool) -> tuple[int, ...]:
        known = {
            name: replace(w, progress_s=0.0, waiting=workers.get(name, False))
            for name, w in desk.state.roster.workers.items()
        }
        roster = replace(desk.state.roster, workers=known)
        return members.stuck(replace(desk.state, roster=roster), at_s=at_s)

    assert stuck(began + short + 0.01) == ()
    assert stuck(began + long) == () and stuck(began + long + 0.01) == (0, 1, 2)
    assert stuck(began + short, w1=True) == ()
    assert stuck(began + short + 0.01, w1=True) == (0, 2)
    paused = with_fields(desk.state, {"paused": {"w0": 8}})
    assert members.stuck(paused, at_s=began + short + 0.01) == (1, 2)
    assert members.stuck(replace(desk.state, phase=Phase.FENCING), at_s=1e9) == ()
    gone = replace(desk.state.roster, workers={"w1": desk.state.roster.workers["w1"]})
    assert members.stuck(replace(desk.state, roster=gone), at_s=1e9) == (1,)


def test_all_wait_only_if_nobody_moves_and_somebody_is_there() -> None:
    desk = running(**CALM)
    limit_s = desk.state.config.timeouts.no_progress_s
    at_s = desk.state.phase_s + limit_s

    def waits(at_s: float, **workers: bool) -> bool:
        known = {
            name: replace(w, progress_s=0.0, waiting=workers.get(name, True))
            for name, w in desk.state.roster.workers.items()
        }
        state = replace(desk.state, roster=replace(desk.state.roster, workers=known))
        return suspicion.all_wait(state, at_s=at_s)

    assert not waits(at_s) and waits(at_s + 0.01)
    assert not waits(at_s + 0.01, w1=False)
    everybody = with_fields(desk.state, {"paused": dict.fromkeys(("w0", "w1", "w2"), 8)})
    assert not suspicion.all_wait(everybody, at_s=1e9)
    assert not suspicion.all_wait(replace(desk.state, phase=Phase.HOLDING), at_s=1e9)
    due = with_fields(desk.state, {"suspicion_s": 0.0})
    grace_s = desk.state.config.timeouts.suspicion_grace_s
    assert not suspicion.is_due(due, at_s=grace_s - 0.01)
    assert suspicion.is_due(due, at_s=grace_s) and not suspicion.is_due(desk.state, at_s=1e9)


def test_vectors_are_lost_a_stall_after_the_last_pause_or_commit() -> None:
    desk = running(**CALM)
    limit_s = desk.state.config.timeouts.report_s
    for paused_s, flushed_s in ((50.0, 20.0), (20.0, 50.0)):
        state = with_fields(desk.state, {"paused_s": paused_s, "flushed_s": flushed_s})
        assert not patience.has_lost_vectors(state, at_s=50.0 + limit_s)
        assert patience.has_lost_vectors(state, at_s=50.0 + limit_s + 0.01)


def test_a_last_manifest_has_its_time_and_no_other_wait_is_one() -> None:
    desk = running(**CALM)
    pending = with_fields(desk.state, {"manifest_pending": True, "finalized_s": 7.0})
    final = replace(pending, phase=Phase.FINALIZING)
    limit_s = desk.state.config.timeouts.standstill_s
    assert not patience.manifest_too_long(final, at_s=7.0 + limit_s)
    assert patience.manifest_too_long(final, at_s=7.0 + limit_s + 0.01)
    assert not patience.manifest_too_long(pending, at_s=1e9)
    assert not patience.manifest_too_long(with_fields(final, {"manifest_pending": False}), at_s=1e9)
    assert patience.finalizing_too_long(pending, at_s=1e9) == ()
    assert patience.finalizing_too_long(final, at_s=1e9) == (0, 1, 2)
    done = with_fields(final, {"finalized": {"w0": 1, "w1": 1}, "digest": "x"})
    assert patience.finalizing_too_long(done, at_s=1e9) == (2,)
    owing = with_fields(final, {"finalized": {"w0": 1, "w1": 1, "w2": 1},
                                "digests": {8: {"w0": ()}}})  # fmt: skip
    assert patience.finalizing_too_long(owing, at_s=1e9) == (1, 2)
    late_s = desk.state.phase_s + desk.state.config.timeouts.final_s
    assert patience.finalizing_too_long(final, at_s=max(late_s, 0.0)) == ()


def test_slots_as_configured_as_wanted_or_as_memory_allows() -> None:
    shape = {"num_nodes": 4, "num_experts": 10, "started_nodes": 4, "min_replicas": 2,
             "spare_losses": 1}  # fmt: skip

    def slots(**change: Any) -> int:
        return slots_for(**({"configured": None} | shape | change))

    assert slots(configured=3) == 3 and slots() == 7
    assert slots(spare_losses=0) == 5 and slots(spare_losses=9) == 10
    assert slots(num_nodes=1) == 10 and slots(num_nodes=0) == 10
    assert slots(ranks_per_node=4) == 8 and slots(num_experts=2) == 2
    memory = SlotMemory(per_slot=2.0, per_node=9.0, whole_node=16.0)
    assert slots(memory=memory) == 4 and slots(memory=memory, num_experts=5) == 4
    assert slots(memory=memory, ranks_per_node=2, num_experts=8) == 4
    assert slots(memory=replace(memory, per_node=6.0)) == 3
    for too_little in (5.9, -1.0):
        with pytest.raises(InfeasiblePlacementError, match="memory holds . slots on each of 4"):
            slots(memory=replace(memory, per_node=too_little))


def test_weights_of_slow_nodes_at_their_bounds() -> None:
    assert wanted_weight(1.0, 0.0) == 1.0 == wanted_weight(1.99, 1.0) == wanted_weight(0.1, 1.0)
    assert wanted_weight(2.0, 1.0) == 0.5 and wanted_weight(2.7, 1.0) == 0.375
    assert wanted_weight(4.0, 1.0) == 0.25 == wanted_weight(1e9, 1.0) == wanted_weight(inf, 1.0)


def test_replicas_travel_behind_training_if_they_are_large() -> None:
    moves = [Move(layer=0, expert=e, source=0, target=t) for e, t in ((0, 1), (1, 1), (2, 2))]

    def behind(mode: str = "auto", before_bytes: int = 20) -> bool:
        return heals_behind(moves, mode=mode, record_bytes=10, before_bytes=before_bytes)

    assert not behind() and behind(before_bytes=19) and behind("behind") and not behind("before")
    assert not heals_behind([], mode="behind", record_bytes=10, before_bytes=0)
    assert not heals_behind([], mode="auto", record_bytes=10, before_bytes=-1)


def test_a_recovery_that_can_only_fail_waits_for_no_checkpoint() -> None:
    desk = running(resume="/other", start_step=0, on_lost_expert="partial")
    desk.share("w0", 8)
    desk.share("w2", 8)
    desk.deaf = {"Prepare"}
    desk.lose("w2")
    assert desk.state.phase is Phase.ENDED
    failure = over(desk).failure
    assert failure is not None and failure.error == "LostExpertError"
    calm = running(**REPLICATED)
    calm.share("w0", 8)
    calm.deaf = {"Prepare"}
    calm.lose("w2")
    transition = calm.state.transition
    assert transition is not None and transition.plan is not None
    assert not checkpoint_awaited(calm.state, transition, transition.plan, (), at_s=0.0)


def test_rates_of_all_ranks_are_needed_before_saves_change() -> None:
    desk = running(saves=SaveSettings(every=None), **REPLICATED)
    rates = {"copy_rate": 1e9, "write_rate": 1e9, "window_s": 1.0}
    desk.share("w0", 8, measured=rates)
    desk.share("w1", 8, measured=rates)
    assert set(desk.state.saving.measured) == {"w0", "w1"}
    assert desk.state.saving.adapted is None and not desk.state.pausing.wants
    desk.share("w2", 8, measured=rates)
    assert desk.state.saving.adapted is not None or desk.state.pausing.wants
    fixed = running(saves=SaveSettings(every=0), **REPLICATED)
    fixed.share("w0", 8, measured=rates)
    assert not fixed.state.saving.measured


def test_the_seats_of_a_plan_are_told_as_the_workers_named_themselves() -> None:
    desk = running(**REPLICATED)
    order = desk.told(Prepare)[-1]
    assert order.seats == tuple(
        Seat(worker=f"w{i}", node=i, host="127.0.0.1", keeper=f"w{i}:1") for i in range(3)
    )
    assert order.speeds == () and order.reload == "" and isinstance(order.moves, tuple)


def test_a_fault_for_any_node_strikes_once_and_one_for_a_node_where_it_is_asked_for() -> None:
    for spec, times, done in (("slow@9", 1, [False, False, True]), ("slow:1@9", 2, [False] * 3)):
        desk = running(**REPLICATED)
        body = FaultFired(generation=1, step=9, kind="slow", spec=spec, number=1)
        for worker in ("w0", "w0", "w1"):
            desk.say(worker, body)
        assert len(desk.events("fault_injected")) == times
        assert [order.is_done for order in desk.told(Go)] == done


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("flood", "it is no scripted fault"),
        ("kill:1@10", "the run ended after step 8"),
        ("kill:1@9", "the run ended after step 8"),
        ("leave:1@9", "nobody came by phase forward of step 9"),
        ("kill:3@8", "there never was a node 3"),
        ("kill:2@8", "node 2 was gone before"),
        ("kill:1@8", "nobody came by phase forward of step 8"),
        ("kill@8", "nobody came by phase forward of step 8"),
        ("kill:1@8/transfer", "no transfer came after step 8"),
        ("kill:1@8/backward", "nobody came by phase backward of step 8"),
    ],
)
def test_a_scripted_fault_that_never_struck_is_told_with_the_reason(spec: str, reason: str) -> None:
    desk = running(faults=(spec, "slow@3"), **REPLICATED)
    desk.say("w0", FaultFired(generation=1, step=3, kind="slow", spec="slow@3", number=2))
    desk.lose("w2")
    desk.feed(DriverSaid(body=StopRun(now=True), at_s=desk.now_s))
    (event,) = desk.events("fault_not_fired")
    assert event == {"generation": 2, "spec": spec, "reason": reason}


def test_only_who_owes_an_answer_is_late() -> None:
    for order, answer in (("Fence", "reports"), ("Align", "aligned"), ("Prepare", "ready")):
        desk = running(nodes=4, **CALM)
        desk.deaf = {order}
        desk.lose("w3")
        state, limit_s = desk.state, desk.state.config.timeouts.report_s
        assert state.transition is not None
        late_s = state.transition.phase_s + limit_s + 0.01
        assert reconfigure.overdue(state, at_s=late_s - 0.02) == ()
        assert reconfigure.overdue(state, at_s=late_s) == (0, 1, 2)
        some = replace(state, transition=replace(state.transition, **{answer: {"w0": None}}))
        assert reconfigure.overdue(some, at_s=late_s) == (1, 2)
        waiting = {n: replace(w, waiting=n == "w1") for n, w in state.roster.workers.items()}
        waits = replace(some, roster=replace(state.roster, workers=waiting))
        assert reconfigure.overdue(waits, at_s=late_s) == ((2,) if order == "Prepare" else (1, 2))
        moved = {n: replace(w, progress_s=5.0) for n, w in state.roster.workers.items()}
        moves = replace(some, roster=replace(state.roster, workers=moved))
        assert reconfigure.overdue(moves, at_s=limit_s + 4.99) == ()
        assert reconfigure.overdue(replace(state, phase=Phase.RUNNING), at_s=1e9) == ()
    assert reconfigure.overdue(running(**CALM).state, at_s=1e9) == ()


@pytest.mark.parametrize(("resume", "source"), [(None, "init"), ("/other", "newest:/other 0")])
def test_a_run_begins_from_the_seed_or_from_its_checkpoint(resume: str | None, source: str) -> None:
    (first, *_) = Desk(nodes=2, resume=resume).told(Prepare)
    assert {(r.source, r.generation, r.step) for r in first.restores} == {(source, 0, 0)}
    assert len(first.restores) == 3 and first.reload == ""


def test_nothing_is_adapted_before_a_step_was_measured() -> None:
    desk = running(saves=SaveSettings(every=None), **REPLICATED)
    rates = {"w0": Measured(copy_rate=1e9, write_rate=1e9, window_s=1.0)}
    plan = desk.state.standing.plan
    assert plan is not None and chosen_for(desk.state, plan) is None
    known = with_fields(desk.state, {"measured": rates})
    assert chosen_for(known, plan) is not None
    assert chosen_for(with_fields(known, {"step_s": 0.0}), plan) is None
    assert chosen_for(with_fields(known, {"seats": ("w1",)}), plan) is None
    fixed = replace(known, config=replace(known.config, saves=SaveSettings(every=0)))
    assert chosen_for(fixed, plan) is None


def test_a_candidate_that_dies_takes_back_nobodys_pause() -> None:
    desk = running(join_debounce_s=0.0, **REPLICATED)
    desk.join("w3")
    desk.tick()
    (order,) = {(body.generation) for body in desk.told(Pause)}
    for worker in ("w0", "w1"):
        desk.say(worker, Paused(generation=order, step=8))
    desk.lose("w3")
    assert desk.state.pausing.paused == {"w0": 8, "w1": 8}
    desk.say("w2", Paused(generation=order, step=8))
    assert desk.state.phase is Phase.RUNNING and desk.state.resumed == 2


def test_a_pause_that_is_wanted_is_not_forgotten_when_loads_are_looked_at() -> None:
    desk = running(steps=500, **REPLICATED)
    for step in range(9, 110):
        desk.commit(step)
    assert desk.state.tuning.looked >= 100 and desk.state.pausing.wants == ""
    desk.state = with_fields(desk.state, {"wants": "checkpoint", "looked": 0, "pause_sent": True})
    desk.commit(110)
    assert desk.state.pausing.wants == "checkpoint" and desk.state.tuning.looked == 0

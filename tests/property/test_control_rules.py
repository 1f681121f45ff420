"""Rules of the protocol, each broken on purpose: random plays must notice.

A mutant changes the machine so that it breaks a rule. An invariant must catch each of them within a
bounded number of plays (see ``test_control_plays.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from control_basics import Broken
from control_play import play
from msgspec.structs import replace as changed

from lazarus.control import machine
from lazarus.control.cluster.state import Control, Phase
from lazarus.control.commit import commits
from lazarus.control.membership import members, suspicion
from lazarus.control.messages import (
    Aligned,
    Fence,
    Hello,
    Report,
    Vector,
)
from lazarus.control.plans import verdict
from lazarus.control.ports import Publish, TellAll
from lazarus.control.reconfiguration import preparing, reconfigure
from lazarus.control.restart import replay
from lazarus.runtime.fence.ledger import StepLedger

Patch = pytest.MonkeyPatch
DENSE = {"num_faults": 6, "turns": 200}
MUTANTS: dict[str, tuple[Callable[[Patch], None], set[str], dict[str, Any]]] = {}


def mutant(*rules: str, **how: Any) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """``rules``: what must catch it; ``how``: faults that bring it to light sooner."""

    def keep(change: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS[change.__name__] = (change, set(rules), {**DENSE, **how})
        return change

    return keep


@mutant("I3", "I7", "I6", faults=("witness",))
def vectors_of_the_dead_are_forgotten(patch: Patch) -> None:
    original = members.lose

    def store(state: Control, body: Vector, *, at_s: float) -> Any:
        if body.generation != state.resumed or body.step <= state.step:
            return state, ()
        return replace(
            state,
            committed=replace(
                state.committed,
                known={**state.committed.known, body.step: changed(body, at_s=at_s)},
            ),
        ), ()

    patch.setattr(commits, "on_vector", store)
    patch.setattr(
        members,
        "lose",
        lambda state, serials, **more: original(
            replace(state, committed=replace(state.committed, known={})), serials, **more
        ),
    )


@mutant("I7", "I3", faults=("sniper", "again", "again"))
def the_newest_vector_is_not_kept(patch: Patch) -> None:
    patch.setattr(reconfigure, "_evidence", lambda state: dict(state.committed.known))


@mutant("I3", "I7", "I1", "I2", faults=("sniper",))
def every_verdict_is_redo(patch: Patch) -> None:
    def redo(reports: Any, *, known: Any, published: int) -> verdict.Verdict:
        return verdict.Verdict(step=min(r.committed for r in reports.values()))

    patch.setattr(reconfigure, "verdict", redo)


@mutant("I3", "I7", "I1", "I2", "I5", "I6", "total")
def a_verdict_does_not_wait_for_all_reports(patch: Patch) -> None:
    def judge(state: Control, worker: str, body: Report, *, at_s: float) -> Any:
        now = state.transition
        if state.phase is not Phase.FENCING or now is None or body.generation != now.generation:
            return state, ()
        workers = reconfigure.workers_of(state, now.voters)
        now = replace(now, reports=dict.fromkeys(workers, body))
        return reconfigure._judge(replace(state, transition=now), now, at_s=at_s)

    patch.setattr(reconfigure, "on_report", judge)


@mutant("I10")
def the_fence_is_sent_before_the_claim(patch: Patch) -> None:
    original = reconfigure.begin

    def begin(state: Control, **more: Any) -> Any:
        state, commands = original(state, **more)
        fences = [c for c in commands if isinstance(c, TellAll) and isinstance(c.body, Fence)]
        return state, (*fences, *(c for c in commands if c not in fences))

    patch.setattr(reconfigure, "begin", begin)


@mutant("I6")
def a_commit_is_published_before_it_is_journaled(patch: Patch) -> None:
    original = commits.flush

    def flush(state: Control, *, at_s: float) -> Any:
        state, commands = original(state, at_s=at_s)
        said = [c for c in commands if isinstance(c, Publish)]
        return state, (*said, *(c for c in commands if c not in said))

    patch.setattr(commits, "flush", flush)


@mutant("I6", "I14", "total")
def a_vector_is_published_twice(patch: Patch) -> None:
    def keep(state: Control, body: Vector, *, at_s: float) -> Any:
        if body.generation != state.resumed:
            return state, ()
        state = replace(
            state,
            committed=replace(state.committed, known={**state.committed.known, body.step: body}),
            step=body.step - 1,
        )
        return commits.flush(state, at_s=at_s)

    patch.setattr(commits, "on_vector", keep)


@mutant("I4", faults=("sniper",))
def a_fence_does_not_freeze_the_outcome(patch: Patch) -> None:
    def decide(ledger: StepLedger, vector: Vector) -> bool:
        ledger._take(vector)
        return True

    patch.setattr(StepLedger, "decide", decide)


@mutant("I3", "I5", "I7", "I1", "I2", "I11", "I12", "total", faults=("sniper", "kill"))
def plan_and_prepare_do_not_wait_for_everybody(patch: Patch) -> None:
    original = reconfigure.on_aligned

    def hasty(state: Control, worker: str, body: Aligned, *, at_s: float) -> Any:
        now = state.transition
        if now is not None and state.phase is Phase.ALIGNING:
            everybody = dict.fromkeys(reconfigure.workers_of(state, now.voters), body)
            state = replace(state, transition=replace(now, aligned=everybody))
        return original(state, worker, body, at_s=at_s)

    patch.setattr(reconfigure, "on_aligned", hasty)


@mutant("I12")
def a_holder_is_overlooked(patch: Patch) -> None:
    original = preparing.holders

    def some(aligned: Any, feeders: Any) -> Any:
        return {e: at for e, at in original(aligned, feeders).items() if e != (0, 1)}

    patch.setattr(preparing, "holders", some)


@mutant("I12", "I5")
def anybody_is_asked_for_any_expert(patch: Patch) -> None:
    original = preparing.schedule_moves

    def moves(wanted: Any, owners: Any) -> Any:
        found, lost = original(wanted, owners)
        return tuple(changed(m, source=(m.source + 1) % 2) for m in found), lost

    patch.setattr(preparing, "schedule_moves", moves)


@mutant("I10")
def a_restarted_controller_forgets_its_claims(patch: Patch) -> None:
    original = replay.replayed

    def replayed(state: Control, entry: Any) -> Control:
        if entry["kind"] == "claim":
            return state
        state = original(state, entry)
        return replace(state, generation=max(0, state.resumed - 1))

    patch.setattr(replay, "replayed", replayed)


@mutant("I15")
def a_restarted_controller_adopts_what_was_fenced(patch: Patch) -> None:
    original = members.on_hello

    def hello(state: Control, body: Hello, *, at_s: float) -> Any:
        state, commands = original(state, body, at_s=at_s)
        known = state.roster.workers.get(body.worker)
        if known is not None:
            workers = {**state.roster.workers, body.worker: replace(known, undisturbed=True)}
            state = replace(state, roster=replace(state.roster, workers=workers))
        return state, commands

    patch.setattr(members, "on_hello", hello)


@mutant("I15", faults=("stall",))
def a_stuck_thread_is_never_lost(patch: Patch) -> None:
    patch.setattr(members, "stuck", lambda state, *, at_s: ())


@mutant("I15", faults=("stop",))
def a_silent_node_is_never_lost(patch: Patch) -> None:
    patch.setattr(members, "silent", lambda state, *, at_s: ())
    patch.setattr(reconfigure, "overdue", lambda state, *, at_s: ())
    patch.setattr(members, "stuck", lambda state, *, at_s: ())


@mutant("I15", faults=("link",))
def a_broken_link_is_tried_for_ever(patch: Patch) -> None:
    patch.setattr(suspicion, "MAX_ERRORS", 10**9)


@mutant("I15", faults=("link",))
def anybody_is_blamed_for_a_broken_link(patch: Patch) -> None:
    patch.setattr(suspicion, "culprit", lambda errors, *, alive: min(alive))


@mutant("I11")
def reports_of_an_older_generation_count(patch: Patch) -> None:
    original = reconfigure.on_report

    def lax(state: Control, worker: str, body: Report, *, at_s: float) -> Any:
        if state.transition is not None:
            body = changed(body, generation=state.transition.generation)
        return original(state, worker, body, at_s=at_s)

    patch.setattr(reconfigure, "on_report", lax)


@mutant("I11")
def vectors_of_any_generation_count(patch: Patch) -> None:
    original = commits.on_vector

    def lax(state: Control, body: Vector, *, at_s: float) -> Any:
        return original(state, changed(body, generation=state.resumed), at_s=at_s)

    patch.setattr(commits, "on_vector", lax)


@mutant("I11", "I13", "total", "I6")
def the_excluded_are_still_heard(patch: Patch) -> None:
    original = machine._worker_said

    def said(state: Control, worker: str, body: Any, *, at_s: float) -> Any:
        if worker not in state.roster.workers and isinstance(body, Vector):
            return commits.on_vector(state, body, at_s=at_s)
        return original(state, worker, body, at_s=at_s)

    patch.setattr(machine, "_worker_said", said)


@mutant("I12", "I14", faults=("kill", "everybody"))
def a_run_restarts_although_somebody_is_left(patch: Patch) -> None:
    original = reconfigure._judge

    def judge(state: Control, now: Any, *, at_s: float) -> Any:
        now = replace(now, restarts=bool(state.resumed))
        return original(replace(state, transition=now), now, at_s=at_s)

    patch.setattr(reconfigure, "_judge", judge)


QUICK = list(MUTANTS)[::4]  # each runs many plays


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS],
)
def test_a_broken_rule_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, rules, how = MUTANTS[name]
    change(monkeypatch)
    caught = None
    for seed in range(300):
        try:
            play(seed, **how)
        except Broken as broken:
            caught = broken
            break
    assert caught is not None, "300 plays found nothing"
    assert caught.rule in rules, caught

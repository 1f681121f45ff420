"""State that nobody holds any more: which checkpoint and version it comes from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from control_desk import Desk, running

from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.control.cluster.state import Control, with_fields
from lazarus.control.cluster.transition import Transition
from lazarus.control.messages import Align, Fence, Ready, Restore, Seat, SnapshotHeld
from lazarus.control.saving.losses import (
    differently_read,
    restart,
    restart_step,
    with_versions_read,
)
from placement import PlacementRequest, plan

FULL_4 = StoredCheckpoint(generation=1, step=4, is_full=True)
PARTIAL_8 = StoredCheckpoint(generation=1, step=8, is_full=False)
PLAN = plan(PlacementRequest(load=np.ones((1, 2)), num_nodes=2, slots_per_node=2))


def standing(*checkpoints: StoredCheckpoint, mode: str = "partial", **more: object) -> Control:
    state = running(on_lost_expert=mode).state
    return with_fields(state, {"checkpoints": checkpoints, **more})


def recovering(*ready: tuple[int, ...]) -> Transition:
    """Both ranks hold both experts; each says which step of expert 1 it has read from storage."""
    seats = (Seat(worker="a", node=0), Seat(worker="b", node=1))
    chosen = Restore(
        layer=0, expert=1, source="storage:/ckpt 8", generation=1, step=8, detail="storage,2,64"
    )
    answers = {}
    for seat, steps in zip(seats, ready, strict=True):
        read = [SnapshotHeld(layer=0, expert=1, generation=1, step=s, routed=8 * s) for s in steps]
        answers[seat.worker] = Ready(generation=2, plan_digest="x", restored=tuple(read))
    at = {"generation": 2, "step": 10, "voters": (0, 1), "joiners": (), "leavers": ()}
    more = {"plan": PLAN, "seats": seats, "restores": (chosen,), "ready": answers}
    return Transition(phase_s=0.0, **at, **more)


def test_a_restart_takes_the_newest_checkpoint_or_a_full_one_where_all_is_of_one_step() -> None:
    assert restart_step(standing(FULL_4, PARTIAL_8)) == 8
    assert restart_step(standing(FULL_4, PARTIAL_8, mode="rollback")) == 4
    assert restart_step(standing(PARTIAL_8, mode="rollback")) == 8


def test_a_restart_passes_over_checkpoints_that_are_void_or_cannot_be_read() -> None:
    void = {"lineage": ((1, 0), (2, 6))}  # generation 2 went on from step 6
    assert restart_step(standing(FULL_4, PARTIAL_8, **void)) == 4
    bad = {"bad_sources": frozenset({"/ckpt 8"})}
    assert restart_step(standing(FULL_4, PARTIAL_8, **bad)) == 4


def test_without_a_checkpoint_a_restart_begins_where_the_run_began_if_that_can_be_read() -> None:
    assert restart_step(standing()) == 0
    assert restart_step(standing(bad_sources=frozenset({"init"}))) is None


@pytest.mark.parametrize(
    ("mode", "source"), [("partial", "newest:/ckpt 8"), ("rollback", "storage:/ckpt 8")]
)
def test_an_expert_of_a_restart_may_be_older_only_where_the_user_lets_it(
    mode: str, source: str
) -> None:
    transition = replace(recovering((), ()), step=8)
    way = restart(standing(PARTIAL_8, mode=mode), transition)
    assert way.step == 8 and len(way.restores) == 3
    assert {restore.source for restore in way.restores} == {source}


def test_ranks_that_read_different_versions_of_an_expert_all_take_the_oldest() -> None:
    assert differently_read(recovering((6,), (4,))) == {(0, 1): 4}
    assert differently_read(recovering((6,), ())) == {(0, 1): 6}
    assert differently_read(recovering((6,), (6,))) == {}
    assert differently_read(recovering((), ())) == {}


def test_the_bill_is_for_what_was_read_and_not_for_what_was_asked_for() -> None:
    (read,) = with_versions_read(recovering((6,), (6,))).restores
    assert read.detail == "storage,4,48"
    (asked,) = with_versions_read(recovering((), ())).restores
    assert asked.detail == "storage,2,64"


def test_a_resumed_run_says_from_where_and_a_fresh_one_does_not() -> None:
    assert not running().events("run_resumed")
    desk = Desk(resume="s3://old", start_step=40, deaf_at_first=("Fence",))
    desk.committed = dict.fromkeys(desk.committed, 40)  # they have read what is there
    desk.answer(Fence)
    (event,) = desk.events("run_resumed")
    assert (event["checkpoint"], event["start_step"]) == ("s3://old", 40)
    assert desk.events("run_started")[0]["start_step"] == 40
    assert {body.step for body in desk.told(Align)} == {40}

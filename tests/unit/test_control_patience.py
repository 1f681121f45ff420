"""Every wait has a bound: nobody answers for ever, and no phase lasts for ever (virtual time)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from control_desk import Desk, running

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import ControlConfig, Phase
from lazarus.control.machine import decide
from lazarus.control.messages import DigestItem, DigestPart, Finalized, Heartbeat, Paused
from lazarus.control.ports import Tick, WriteManifest
from lazarus.control.restart.replay import initial_state

S = 10.0
STANDSTILL_S = 600.0
QUORUM_S = 1000.0
CONFIG: dict[str, Any] = {
    "timeouts": replace(derive_timeouts(S), standstill_s=STANDSTILL_S, startup_s=100.0),
    "quorum_timeout_s": QUORUM_S,
    "partial_checkpoints": True,
}


def live(
    desk: Desk, seconds: float, *, moving: set[str] | None = None, waiting: set[str] | None = None
) -> float:
    """Everybody's control thread lives on; returns how long this phase lasted, at most so long."""
    began, phase, nodes = desk.now_s, desk.state.phase, len(desk.state.roster.nodes)
    beat = 0
    while desk.now_s - began < seconds:
        beat += 1
        for worker in tuple(desk.state.roster.workers):
            progress = beat if worker in (moving or ()) else 0
            waits = worker in (waiting or ())
            body = Heartbeat(generation=1, step=0, progress=progress, waiting=waits)
            desk.say(worker, body)
        desk.tick(S / 5)
        if desk.state.phase is not phase or len(desk.state.roster.nodes) != nodes:
            break
    return desk.now_s - began


def paused_at_the_end(**config: Any) -> Desk:
    desk = running(**CONFIG, steps=8, **config)
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=1, step=8))
    return desk


def finalize(desk: Desk, *workers: str, files: str = "{}") -> None:
    for worker in workers:
        items = (DigestItem(name=worker, sha256=b"x" * 32),)
        desk.say(worker, DigestPart(generation=1, step=8, items=items))
        desk.say(worker, Finalized(generation=1, step=8, files=files))


@pytest.mark.parametrize("order", ["Fence", "Align", "Prepare"])
def test_an_order_that_nobody_answers_costs_everybody_and_ends_the_run(order: str) -> None:
    desk = running(**CONFIG)
    desk.deaf = {order}
    desk.lose("w2")
    assert desk.state.phase in (Phase.FENCING, Phase.ALIGNING, Phase.PREPARING)
    assert live(desk, 1e4) <= S + 5.0
    while desk.state.phase is not Phase.ENDED:
        assert live(desk, 1e4) <= QUORUM_S + 5.0
    assert desk.now_s < 2 * QUORUM_S


def test_ranks_that_all_wait_for_each_other_are_asked_again_and_again_but_not_for_ever() -> None:
    desk = running(**CONFIG)
    desk.deaf = {"Prepare"}
    desk.lose("w2")
    everybody = set(desk.state.standing.seats)
    while desk.state.phase is not Phase.ENDED:
        generation, began = desk.state.generation, desk.now_s
        while desk.state.generation == generation and desk.state.phase is not Phase.ENDED:
            live(desk, 2.0, waiting=everybody)
            assert desk.now_s - began <= 3 * S + 9.0
        assert generation < 30
    assert not [e for e in desk.events("node_lost") if e["node"] != 2]


def test_ranks_that_wait_for_one_that_moves_are_not_disturbed() -> None:
    desk = running(**CONFIG)
    desk.deaf = {"Prepare"}
    desk.lose("w2")
    assert live(desk, 100.0, moving={"w0"}, waiting={"w1"}) >= 100.0


def test_a_last_share_that_nobody_sends_costs_the_nodes_and_ends_the_run() -> None:
    desk = paused_at_the_end()
    assert desk.state.phase is Phase.FINALIZING
    finalize(desk, "w0")
    assert 6 * S <= live(desk, 1e4) <= 6 * S + 5.0, "the bound derives from the tolerated stall"
    assert "w0" in desk.state.roster.workers and "w1" not in desk.state.roster.workers
    while desk.state.phase is not Phase.ENDED:
        assert live(desk, 1e4) <= QUORUM_S + STANDSTILL_S
    assert desk.now_s < 3600


def test_a_slow_last_share_that_moves_is_never_cut() -> None:
    desk = paused_at_the_end()
    finalize(desk, "w0", "w1")
    assert live(desk, 2000.0, moving={"w2"}) >= 2000.0
    assert desk.state.phase is Phase.FINALIZING and len(desk.state.roster.nodes) == 3


@pytest.mark.parametrize("standing", [True, False])
def test_a_last_manifest_that_never_comes_ends_the_run_without_it(standing: bool) -> None:
    desk = running(**CONFIG, steps=8)
    if standing:
        desk.written(4)
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=1, step=8))
    finalize(desk, "w0", "w1", "w2", files='{"files": []}')
    assert desk.of(WriteManifest)
    assert STANDSTILL_S <= live(desk, 1e4) <= STANDSTILL_S + 5.0
    (end,) = desk.events("run_finished")
    assert desk.state.phase is Phase.ENDED
    assert (end["status"], end["cause"]) == ("short" if standing else "failed", "storage")


def test_a_vector_that_was_lost_is_asked_for_after_the_stall() -> None:
    desk = running(**CONFIG)
    for worker in desk.state.standing.seats:
        desk.committed[worker] = 9  # but its vector never came
        desk.say(worker, Paused(generation=1, step=9))
    desk.deaf = {"Fence"}
    assert live(desk, 1e4) <= S + 5.0
    assert desk.state.phase is Phase.FENCING


def test_nodes_that_never_come_end_the_start_and_the_hold() -> None:
    state = initial_state(ControlConfig(steps=8, nodes=3, min_nodes=2, **CONFIG), term=1, now_s=0.0)
    now_s = 0.0
    while state.phase is Phase.GATHERING and now_s < 1e5:
        now_s += 1.0
        state, _ = decide(state, Tick(at_s=now_s))
    assert state.phase is Phase.ENDED and now_s <= 100.0 + QUORUM_S + 5.0
    desk = running(**CONFIG, min_nodes=3)
    desk.lose("w2")
    assert desk.state.phase is Phase.HOLDING
    assert live(desk, 1e4) <= QUORUM_S + 5.0
    assert desk.state.phase is Phase.ENDED

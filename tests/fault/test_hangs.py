"""Nodes that do not die: stopped, stuck, slow, raising."""

from __future__ import annotations

from typing import Any

import pytest

from lazarus.errors import UserCodeError

STEPS = 7
STALL_S = 4.0
QUICK = (f"recovery.tolerated_stall_s={STALL_S}",)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("phase", ["forward", "combine", "grad_sync", "commit", "optimizer"])
@pytest.mark.parametrize("kind", ["stop", "stall"])
def test_a_hung_node_is_lost_after_the_stall_and_leaves_the_bits_of_a_leave(
    run: Any, kind: str, phase: str
) -> None:
    outcome = run(f"{kind}:2@4/{phase}", steps=STEPS, settings=QUICK)
    assert [(e["node"], e["kind"]) for e in outcome.of("fault_injected")] == [(2, kind)]
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    outcome.assert_exactly_once(STEPS)
    (fault,), (lost,) = outcome.of("fault_injected"), outcome.of("node_lost")
    assert lost["t"] - fault["t"] <= STALL_S + 1.0
    (healed,) = outcome.of("reconfigured")
    assert healed["phases"]["detect"] <= STALL_S + 1.0
    base = outcome.resumed_at(healed["generation"])
    assert outcome.digest == run(f"leave:2@{base + 1}", steps=STEPS).digest


@pytest.mark.parametrize("kind", ["stop", "stall"])
@pytest.mark.parametrize("phase", ["reconfigure", "transfer"])
def test_a_hang_during_a_recovery_costs_the_hung_node_alone(
    run: Any, kind: str, phase: str
) -> None:
    settings = (*QUICK, "recovery.heal=before")
    outcome = run("kill:2@4", f"{kind}:3@4/{phase}", nodes=4, steps=STEPS, settings=settings)
    assert {e["kind"] for e in outcome.of("fault_injected")} == {"kill", kind}
    assert [e["node"] for e in outcome.of("node_lost")] == [2, 3]
    outcome.assert_exactly_once(STEPS)


def test_a_thread_stuck_after_the_last_commit_does_not_hold_the_end(run: Any) -> None:
    outcome = run(f"stall:2@{STEPS}/optimizer", steps=STEPS, settings=QUICK)
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    outcome.assert_exactly_once(STEPS)


def test_a_short_stop_is_no_loss(run: Any) -> None:
    outcome = run("stop:2@4/forward,for=800ms", steps=STEPS, settings=QUICK)
    assert [e["kind"] for e in outcome.of("fault_injected")] == ["stop"]
    assert not outcome.of("node_lost")
    outcome.assert_exactly_once(STEPS)
    assert outcome.digest == run(steps=STEPS).digest


def test_a_slow_node_is_never_lost(run: Any) -> None:
    settings = ("recovery.tolerated_stall_s=2", "train.global_batch=24")
    outcome = run("slow:2@3,factor=3,steps=60", nodes=3, steps=60, settings=settings)
    assert [e["kind"] for e in outcome.of("fault_injected")] == ["slow"]
    assert not outcome.of("node_lost")
    outcome.assert_exactly_once(60)


def test_user_code_that_raises_on_one_node_costs_that_node(run: Any) -> None:
    outcome = run("crash:2@4", steps=STEPS)
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    (error,) = outcome.of("user_error")
    assert error["node"] == 2 and "injected crash" in error["traceback"]
    outcome.assert_exactly_once(STEPS)
    base = outcome.resumed_at(outcome.of("reconfigured")[-1]["generation"])
    assert outcome.digest == run(f"leave:2@{base + 1}", steps=STEPS).digest


def test_user_code_that_raises_everywhere_ends_the_run_with_its_traceback(run: Any) -> None:
    faults = [f"crash:{node}@4" for node in range(3)]
    with pytest.raises(UserCodeError) as caught:
        run(*faults, nodes=3, steps=STEPS)
    assert "InjectedCrashError" in caught.value.traceback_text
    assert "step 4" in caught.value.where

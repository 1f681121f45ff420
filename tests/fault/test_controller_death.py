"""The controller dies: workers train on, it comes back from its journal, no step is doubled."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, at_step, journal_of, watch

from lazarus.basics.clock import now_s

STEPS = 8

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def terms(folder: Path) -> list[int]:
    return [entry["term"] for entry in journal_of(folder) if entry["kind"] == "term"]


@pytest.fixture(scope="module")
def undisturbed(run: Any) -> Any:
    return run(steps=STEPS)


@pytest.mark.parametrize("phase", ["forward", "combine", "grad_sync", "commit", "optimizer"])
def test_training_does_not_stop_when_the_controller_dies(
    run: Any, undisturbed: Any, phase: str
) -> None:
    outcome = run(f"controller@4/{phase}", steps=STEPS)
    assert [e["kind"] for e in outcome.of("fault_injected")] == ["controller"]
    assert terms(outcome.folder) == [1, 2]
    assert not outcome.of("node_lost") and not outcome.of("reconfigured")
    outcome.assert_exactly_once(STEPS)
    assert outcome.digest == undisturbed.digest


@pytest.mark.parametrize("phase", ["commit", "optimizer"])
def test_the_controller_dies_at_the_very_end(run: Any, undisturbed: Any, phase: str) -> None:
    outcome = run(f"controller@{STEPS}/{phase}", steps=STEPS)
    assert terms(outcome.folder) == [1, 2]
    outcome.assert_exactly_once(STEPS)
    assert outcome.of("run_finished")[-1]["status"] == "finished"
    assert outcome.digest == undisturbed.digest


def test_a_stop_that_a_dead_controller_heard_is_said_again(tmp_path: Path) -> None:
    def stop_and_kill(watched: Watched) -> None:
        os.kill(watched.controller_pid(), signal.SIGKILL)
        watched.stop()

    run = watch(tmp_path, nodes=3, steps=100_000, acts=[at_step(3, stop_and_kill)])
    assert run.status == "stopped" and terms(tmp_path) == [1, 2]
    assert run.steps == list(range(1, len(run.steps) + 1))


@pytest.mark.parametrize("phase", ["grad_sync", "reconfigure"])
def test_a_node_is_lost_together_with_the_controller(run: Any, phase: str) -> None:
    outcome = run("kill:2@4/grad_sync", f"controller@4/{phase}", steps=STEPS)
    assert {e["kind"] for e in outcome.of("fault_injected")} == {"kill", "controller"}
    assert terms(outcome.folder) == [1, 2]
    outcome.assert_exactly_once(STEPS)
    assert outcome.of("step_committed")[-1]["num_nodes"] == 4
    resumes = [e for e in journal_of(outcome.folder) if e["kind"] == "resume"]
    base = next(e["step"] for e in reversed(resumes) if 2 not in e["nodes"])
    assert outcome.digest == run(f"leave:2@{base + 1}", steps=STEPS).digest


def test_the_controller_dies_while_the_run_is_about_to_pause(run: Any) -> None:
    outcome = run("leave:2@5", "controller@4/optimizer", steps=STEPS)
    assert {e["kind"] for e in outcome.of("fault_injected")} == {"leave", "controller"}
    assert [e["node"] for e in outcome.of("node_left")] == [2]
    outcome.assert_exactly_once(STEPS)
    assert outcome.digest == run("leave:2@5", steps=STEPS).digest


def test_the_controller_may_die_again_and_again(tmp_path: Path) -> None:
    def kill(watched: Watched) -> None:
        os.kill(watched.controller_pid(), signal.SIGKILL)

    acts = [at_step(step, kill) for step in (5, 60, 120)]
    run = watch(tmp_path, nodes=3, steps=200, acts=acts)
    assert terms(tmp_path) == [1, 2, 3, 4]
    assert run.steps == list(range(1, 201))
    assert not run.of("node_lost")


def test_what_keeps_all_workers_away_costs_none_of_them(tmp_path: Path) -> None:
    """A4: the first one is back later than the stall after its start, the others behind it."""
    stall_s = 2.0
    threads: list[threading.Thread] = []

    def wake(watched: Watched, pids: list[int]) -> None:
        pause, deadline_s = threading.Event(), now_s() + 60
        while len(terms(watched.folder)) < 2 and now_s() < deadline_s:
            pause.wait(0.05)
        pause.wait(2 * stall_s)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def keep_away(watched: Watched) -> None:
        pids = [pid for node in watched.node_names() for pid in watched.pids(node)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        os.kill(watched.controller_pid(), signal.SIGKILL)
        threads.append(threading.Thread(target=wake, args=(watched, pids)))
        threads[0].start()

    acts = [at_step(3, keep_away), (lambda e: e["event"] == "controller_restarted", Watched.stop)]
    settings = [f"recovery.tolerated_stall_s={stall_s}"]
    run = watch(tmp_path, nodes=3, steps=100_000, settings=settings, acts=acts)
    threads[0].join()
    assert terms(tmp_path) == [1, 2]
    assert not run.of("node_lost")
    assert run.steps == list(range(1, len(run.steps) + 1))

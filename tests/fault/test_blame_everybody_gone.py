"""All nodes are gone at once: the run waits for others and goes on from its newest checkpoint.

And a run that is stopped while it waits keeps what the survivors have in memory.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fault_runs import Event, Watched, watch

from lazarus.checkpoint.files.verify import verify
from lazarus.errors import QuorumTimeoutError
from lazarus.record import metrics

pytestmark = pytest.mark.timeout(240)

STEPS = 16
SETTINGS = (
    "checkpoint.every=4",
    "checkpoint.select=full",
    "checkpoint.full_at_end=true",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "metrics.report=false",
)


def kill_all(watched: Watched) -> None:
    """Every process of every node, as when a zone goes dark."""
    for node in watched.node_names():
        watched.signal(node, signal.SIGKILL)


def refuse_nodes(watched: Watched) -> None:
    """No machine is free."""
    assert watched.handle is not None
    watched.handle._driver._launcher.machines = lambda: ()  # type: ignore[method-assign]


def when_persisted(step: int) -> object:
    return lambda e: e["event"] == "checkpoint_persisted" and e["step"] >= step


@pytest.mark.slow
def test_a_run_whose_nodes_are_all_gone_restarts_from_its_newest_checkpoint(
    tmp_path: Path,
) -> None:
    """D15: holds, asks for nodes, restarts, says so; every step counts once in the end."""
    run = watch(
        tmp_path / "run",
        nodes=2,
        steps=STEPS,
        settings=SETTINGS,
        acts=[(when_persisted(4), kill_all)],
    )
    assert {e["node"] for e in run.of("node_lost")} == {0, 1}
    held = [e for e in run.of("quorum_lost") if "every node is lost" in e["reason"]]
    assert len(held) == 1 and held[0]["nodes"] == []
    (again,) = run.of("run_restarted")
    assert again["step"] >= 4 and again["step"] % 4 == 0
    assert again["checkpoint"] == str(tmp_path / "run" / "checkpoints")
    assert again["from_step"] >= again["step"]
    assert len(run.of("quorum_regained")) == 1 and run.status == "finished"
    counted = metrics.committed_steps(run.events)
    assert list(counted) == list(range(1, STEPS + 1))
    assert metrics.steps_lost(run.events) == again["from_step"] - again["step"]
    first: dict[int, Event] = {}
    for event in run.of("step_committed"):
        before = first.setdefault(event["step"], event)
        assert event["loss"] == pytest.approx(before["loss"], rel=1e-4)
    found = verify(str(tmp_path / "run" / "checkpoints"))
    assert not found.bad and found.usable[-1] == STEPS


@pytest.mark.slow
def test_a_rollback_goes_back_to_the_newest_checkpoint_with_every_expert(tmp_path: Path) -> None:
    """D15 with ``recovery.on_lost_expert=rollback``: a newer one of some experts is passed over."""
    run = watch(
        tmp_path / "run",
        nodes=2,
        steps=STEPS,
        settings=(
            "recovery.on_lost_expert=rollback",
            "checkpoint.every=4",
            "checkpoint.k_snapshot=2",
            "checkpoint.k_persist=2",
            "checkpoint.keep=20",
            *SETTINGS[3:],
        ),
        acts=[(when_persisted(8), kill_all)],
    )
    assert {e["node"] for e in run.of("node_lost")} == {0, 1}
    saved = {e["step"]: e["kind"] for e in run.of("checkpoint_persisted")}
    assert saved[4] == "full" and saved[8] != "full"
    (again,) = run.of("run_restarted")
    assert again["step"] == 4 and again["from_step"] >= 8
    assert run.status == "finished" and not run.of("expert_restored")
    (end,) = run.of("run_finished")
    assert end["plt"] == 0.0
    first: dict[int, Event] = {}
    for event in run.of("step_committed"):
        before = first.setdefault(event["step"], event)
        assert event["loss"] == pytest.approx(before["loss"], rel=1e-4)
    assert sorted(first) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_without_a_checkpoint_the_run_begins_again_from_its_seed(tmp_path: Path) -> None:
    """D15: and says so plainly."""
    acts = [(lambda e: e["event"] == "step_committed" and e["step"] >= 3, kill_all)]
    settings = ("checkpoint.every=1000", *SETTINGS[3:])
    run = watch(tmp_path / "run", nodes=2, steps=8, settings=settings, acts=acts)
    (again,) = run.of("run_restarted")
    assert (again["step"], again["checkpoint"]) == (0, "") and again["from_step"] >= 3
    assert list(metrics.committed_steps(run.events)) == list(range(1, 9))
    assert run.status == "finished"


@pytest.mark.slow
def test_where_no_node_comes_the_run_ends_short_after_the_quorum_timeout(tmp_path: Path) -> None:
    """D15: exit 3, with what can be done; not at once."""
    with pytest.raises(QuorumTimeoutError) as caught:
        watch(
            tmp_path / "run",
            nodes=2,
            steps=1000,
            settings=("cluster.quorum_timeout_s=3", *SETTINGS),
            acts=[
                (lambda e: e["event"] == "run_started", refuse_nodes),
                (when_persisted(4), kill_all),
            ],
        )
    assert caught.value.exit_code == 3 and caught.value.live == 0


def test_a_run_that_is_stopped_below_quorum_saves_the_step_it_holds(tmp_path: Path) -> None:
    """R13: a full checkpoint of the held step, though the last periodic one is older."""
    waiting = {"step": 0}

    def stop(watched: Watched) -> None:
        waiting["step"] = max(metrics.committed_steps(journaled_events(watched)))
        watched.stop()

    run = watch(
        tmp_path / "run",
        "kill:1@7",
        nodes=3,
        steps=1000,
        settings=("cluster.min_nodes=3", *SETTINGS),
        acts=[
            (lambda e: e["event"] == "run_started", refuse_nodes),
            (lambda e: e["event"] == "quorum_lost", stop),
        ],
    )
    assert [e["node"] for e in run.of("node_lost")] == [1]
    assert len(run.of("quorum_lost")) == 1 and run.status == "stopped"
    held = waiting["step"]
    assert held in (6, 7) and run.steps[-1] == held
    found = verify(str(tmp_path / "run" / "checkpoints"))
    assert not found.bad and found.usable[-1] == held
    (end,) = run.of("run_finished")
    assert end["status"] == "stopped" and end["state_digest"]


def journaled_events(watched: Watched) -> list[Event]:
    from lazarus.record.events import read_events

    return read_events(watched.folder / "events.jsonl")

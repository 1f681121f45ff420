"""What dies by itself is started again, up to ``cluster.nodes``, but not for ever in one place."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_runs import Act, Action, Event, Watched, after, at_step, watch

pytestmark = pytest.mark.timeout(240)

MANY = 100_000  # steps; every test stops its run when it has seen what it wants
REPLACES = ("cluster.replace_lost=true", "recovery.tolerated_stall_s=10")


def killed(node: str) -> Action:
    return lambda watched: watched.signal(node, signal.SIGKILL)


def test_a_process_that_dies_by_itself_is_started_again_above_quorum_too(tmp_path: Path) -> None:
    """R2: one of three processes dies, the floor is low, no machine is missing."""
    run = watch(
        tmp_path,
        nodes=3,
        steps=MANY,
        settings=REPLACES,
        acts=[
            at_step(3, killed("node-1")),
            after("node_lost", "node_joined", nodes=3, action=Watched.stop),
        ],
    )
    assert [e["node"] for e in run.of("node_lost")] == [run.number_of("node-1")]
    assert [e["node"] for e in run.of("node_joined")] == [3]  # a new node on the old machine
    assert not run.of("quorum_lost")
    assert run.steps == list(range(1, len(run.steps) + 1))


@pytest.mark.slow
def test_a_machine_whose_node_dies_again_and_again_is_suspect_and_then_left_alone(
    tmp_path: Path,
) -> None:
    """R2: back-off per machine, and a limit; whoever is well trains on."""

    def end_what_comes(run: Watched, event: Event) -> None:
        if event["event"] == "node_joined":
            run.signal(run.name_of(event["node"]), signal.SIGKILL)

    run = watch(
        tmp_path,
        nodes=3,
        steps=MANY,
        settings=("cluster.replace_lost=true", "recovery.tolerated_stall_s=4"),
        acts=[at_step(2, killed("node-2")), after("node_banned", nodes=2, action=Watched.stop)],
        on_event=end_what_comes,
    )
    lost = run.of("node_lost")
    assert [e["node"] for e in lost] == [run.number_of("node-2"), 3, 4, 5, 6, 7]
    (suspect, *_), (banned,) = run.of("machine_suspect"), run.of("node_banned")
    assert "3 nodes were lost there" in suspect["reason"]
    assert "6 nodes in a row" in banned["reason"]
    assert suspect["machine"] == banned["machine"]
    gaps = [b["t"] - a["t"] for a, b in zip(lost, run.of("node_joined"), strict=False)]
    assert all(gap > 2.0 * 2**n for n, gap in enumerate(gaps[1:])), gaps  # half a stall, doubled
    assert {e["node"] for e in run.of("node_joined")} == {3, 4, 5, 6, 7}
    assert run.steps == list(range(1, len(run.steps) + 1))


@pytest.mark.slow
def test_a_fault_on_purpose_takes_its_machine_along_and_a_key_turns_replacing_off(
    tmp_path: Path,
) -> None:
    def run_of(
        name: str, *faults: str, replaces: str, end: Act, acts: Sequence[Act] = ()
    ) -> Watched:
        settings = (f"cluster.replace_lost={replaces}", "recovery.tolerated_stall_s=10")
        return watch(
            tmp_path / name, *faults, nodes=3, steps=MANY, settings=settings, acts=[*acts, end]
        )

    end = after("node_lost", nodes=2, action=Watched.stop)
    scripted = run_of("scripted", "kill:1@3", replaces="true", end=end)
    assert [e["kind"] for e in scripted.of("fault_injected")] == ["kill"]
    assert not scripted.of("node_joined", "nodes_awaited")

    end = after("node_lost", nodes=2, action=Watched.stop)
    act = at_step(3, killed("node-1"))
    off = run_of("off", replaces="false", acts=[act], end=end)
    assert [e["node"] for e in off.of("node_lost")] == [off.number_of("node-1")]
    assert not off.of("node_joined", "nodes_awaited")


@pytest.mark.slow
def test_a_stopped_process_is_evicted_and_its_machine_rests_before_it_is_used_again(
    tmp_path: Path,
) -> None:
    """R3: what does not answer is not chosen at once."""
    run = watch(
        tmp_path,
        nodes=3,
        steps=MANY,
        settings=("cluster.replace_lost=true", "recovery.tolerated_stall_s=4"),
        acts=[
            at_step(3, lambda watched: watched.signal("node-1", signal.SIGSTOP)),
            after("node_lost", "node_joined", nodes=3, action=Watched.stop),
        ],
    )
    (lost,), (joined,) = run.of("node_lost"), run.of("node_joined")
    assert lost["node"] == run.number_of("node-1")
    assert lost["cause"] in ("no heartbeat", "no progress", "no answer")
    assert joined["t"] - lost["t"] > 2.0  # half a stall

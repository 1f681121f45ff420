"""Too few nodes: the state is kept, the record says so, and nodes that come end the wait."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import Watched, watch

from lazarus.errors import QuorumTimeoutError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS = 8


def test_below_quorum_the_run_holds_and_goes_on_when_a_node_comes(tmp_path: Path) -> None:
    run = watch(tmp_path, "kill:1@4", nodes=3, steps=STEPS, settings=["cluster.min_nodes=3"])
    assert [e["node"] for e in run.of("node_lost")] == [1]
    (held,) = run.of("quorum_lost")
    assert "2 of at least 3" in held["reason"]
    assert run.of("node_joined") and len(run.of("quorum_regained")) == 1
    assert run.steps == list(range(1, STEPS + 1))
    assert {e["num_nodes"] for e in run.of("step_committed")} == {3}


def test_with_fewer_slots_than_experts_the_run_holds_with_the_numbers(tmp_path: Path) -> None:
    run = watch(tmp_path, "kill:0@4", "kill:2@4", nodes=3, steps=STEPS)
    assert {e["node"] for e in run.of("node_lost")} == {0, 2}
    held = run.of("quorum_lost")
    assert held and "6 experts" in held[0]["reason"] and "1 nodes x 4 slots" in held[0]["reason"]
    claims = [e for e in run.journal() if e["kind"] == "claim"]
    assert len(claims) <= 8, "a hold must not claim a generation at every event"
    assert run.steps == list(range(1, STEPS + 1))


def test_a_hold_without_new_nodes_ends_with_the_numbers(tmp_path: Path) -> None:
    def refuse(watched: Watched) -> None:
        assert watched.handle is not None
        watched.handle._driver._launcher.machines = lambda: ()  # type: ignore[method-assign]

    with pytest.raises(QuorumTimeoutError) as caught:
        watch(
            tmp_path,
            "kill:1@4",
            nodes=2,
            steps=STEPS,
            settings=["cluster.min_nodes=2", "cluster.quorum_timeout_s=2"],
            acts=[(lambda e: e["event"] == "run_started", refuse)],
        )
    assert caught.value.live == 1 and caught.value.needed == 2

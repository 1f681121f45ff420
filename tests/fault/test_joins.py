"""Nodes that come: at a boundary, fed by peers, also while others go."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import Watched, after, at_step, watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MANY = 3000  # steps; every test stops its run when it has seen what it wants


def assert_gapless(run: Watched) -> None:
    assert run.steps == list(range(1, len(run.steps) + 1))


def test_a_node_joins_in_mid_run_and_takes_its_share(tmp_path: Path) -> None:
    stop = after("node_joined", nodes=4, action=Watched.stop)
    run = watch(tmp_path, "join@3", nodes=3, steps=MANY, acts=[stop])
    assert [e["kind"] for e in run.of("fault_injected")] == ["join"]
    assert [e["node"] for e in run.of("node_joined")] == [3]
    assert_gapless(run)
    (healed,) = run.of("reconfigured")
    assert healed["joined"] == [3]
    assert healed["bytes_moved"] > 0, "a joiner is fed dense state at least"


def test_a_joiner_that_dies_while_it_is_fed_disturbs_nobody(tmp_path: Path) -> None:
    stop = after("node_lost", nodes=3, action=Watched.stop)
    run = watch(tmp_path, "join@3", "kill:3@4/transfer", nodes=3, steps=MANY, acts=[stop])
    assert {e["kind"] for e in run.of("fault_injected")} == {"join", "kill"}
    assert [e["node"] for e in run.of("node_lost")] == [3]
    assert not run.of("node_joined")
    assert_gapless(run)


def test_a_member_that_dies_while_it_feeds_a_joiner_is_a_loss_like_any(tmp_path: Path) -> None:
    stop = after("node_lost", "node_joined", nodes=3, action=Watched.stop)
    run = watch(tmp_path, "join@3", "kill:1@4/transfer", nodes=3, steps=MANY, acts=[stop])
    assert [e["node"] for e in run.of("node_lost")] == [1]
    assert [e["node"] for e in run.of("node_joined")] == [3]
    assert_gapless(run)


def test_several_nodes_join_together(tmp_path: Path) -> None:
    stop = after("node_joined", nodes=5, action=Watched.stop)
    run = watch(
        tmp_path,
        "join@2,count=3",
        nodes=2,
        steps=MANY,
        settings=["cluster.join_debounce_s=1"],
        acts=[stop],
    )
    assert {e["node"] for e in run.of("node_joined")} == {2, 3, 4}
    assert_gapless(run)


def test_a_node_started_by_the_driver_joins_unasked(tmp_path: Path) -> None:
    acts = [
        at_step(2, Watched.start_node),
        after("node_joined", nodes=3, action=Watched.stop),
    ]
    run = watch(tmp_path, nodes=2, steps=MANY, acts=acts)
    assert [e["node"] for e in run.of("node_joined")] == [2]
    assert_gapless(run)

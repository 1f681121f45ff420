"""Nodes that go on purpose: nothing is lost, nothing is redone."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, after, at_step, watch

STEPS = 7

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("nodes", [(2,), (0,), (1, 3)], ids=["middle", "first", "two"])
def test_a_leave_happens_at_its_boundary(run: Any, nodes: tuple[int, ...]) -> None:
    outcome = run(*(f"leave:{node}@4" for node in nodes), steps=STEPS)
    assert {e["node"] for e in outcome.of("node_left")} == set(nodes)
    assert {e["node"] for e in outcome.of("drain_notice")} == set(nodes)
    assert not outcome.of("node_lost")
    outcome.assert_exactly_once(STEPS)
    members = {e["step"]: e["num_nodes"] for e in outcome.of("step_committed")}
    assert members == {s: 5 if s < 4 else 5 - len(nodes) for s in range(1, STEPS + 1)}
    (healed,) = outcome.of("reconfigured")
    assert healed["reason"] == "leave" and healed["step"] == 3


def test_sigterm_is_a_notice(tmp_path: Path) -> None:
    acts = [
        at_step(3, lambda watched: watched.signal("node-1", signal.SIGTERM)),
        after("node_left", nodes=2, action=Watched.stop),
    ]
    run = watch(tmp_path, nodes=3, steps=3000, acts=acts)
    serial = run.number_of("node-1")
    (notice,) = run.of("drain_notice")
    assert notice["node"] == serial and "SIGTERM" in notice["cause"]
    assert [e["node"] for e in run.of("node_left")] == [serial]
    assert not run.of("node_lost")
    assert run.steps == list(range(1, len(run.steps) + 1))


@pytest.mark.parametrize("phase", ["commit", "reconfigure"])
def test_a_leaver_that_dies_before_it_has_gone_is_a_loss(run: Any, phase: str) -> None:
    outcome = run("leave:2@5", f"kill:2@4/{phase}", steps=STEPS)
    assert {e["kind"] for e in outcome.of("fault_injected")} == {"leave", "kill"}
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    assert not outcome.of("node_left")
    outcome.assert_exactly_once(STEPS)
    base = outcome.resumed_at(outcome.of("reconfigured")[-1]["generation"])
    assert outcome.digest == run(f"leave:2@{base + 1}", steps=STEPS).digest

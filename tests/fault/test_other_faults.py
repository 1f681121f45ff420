"""Hung, stuck, raising, slow, leaving and joining nodes, and a controller that dies."""

from __future__ import annotations

from typing import Any

import pytest

QUICK = ("recovery.tolerated_stall_s=3", "cluster.join_debounce_s=0.2")
STEP, STEPS = 4, 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("stop:2@4/forward", {"no progress", "no heartbeat"}),
        ("stall:2@4/backward", {"no progress"}),
        ("crash:2@4/forward", {"user code raised"}),
    ],
)
def test_a_node_that_hangs_or_raises_is_a_loss_with_the_bits_of_a_leave(
    run: Any, fault: str, cause: set[str]
) -> None:
    outcome = run(fault, nodes=5, steps=STEPS, settings=QUICK)

    (fired,) = outcome.of("fault_injected")
    (lost,) = outcome.of("node_lost")
    assert fired["node"] == lost["node"] == 2
    assert lost["cause"] in cause
    assert lost["t"] - fired["t"] <= 3.0 + 1.0 + 3.0  # the stall, a second, a loaded machine
    outcome.assert_exactly_once(STEPS)
    last = max(e["generation"] for e in outcome.of("reconfigured"))
    left = run(f"leave:2@{outcome.resumed_at(last) + 1}", nodes=5, steps=STEPS)
    assert outcome.digest == left.digest


@pytest.mark.slow
def test_training_goes_on_without_a_controller_and_the_bits_do_not_care(run: Any) -> None:
    outcome = run("controller@3", nodes=4, steps=STEPS, settings=QUICK)

    assert [e["kind"] for e in outcome.of("fault_injected")] == ["controller"]
    (back,) = outcome.of("controller_restarted")
    assert back["term"] == 2
    assert not outcome.of("node_lost")
    outcome.assert_exactly_once(STEPS)
    assert outcome.digest == run(nodes=4, steps=STEPS).digest


@pytest.mark.slow
def test_a_loss_after_the_controller_came_back_is_handled(run: Any) -> None:
    outcome = run("controller@3", "kill:1@5", nodes=4, steps=STEPS, settings=QUICK)

    assert outcome.of("controller_restarted")
    assert {e["node"] for e in outcome.of("node_lost")} == {1}
    outcome.assert_exactly_once(STEPS)


@pytest.mark.slow
def test_a_slow_node_is_never_lost_and_gets_fewer_samples(run: Any) -> None:
    settings = (*QUICK, "train.global_batch=32", "model.seq_len=32")
    outcome = run("slow:1@3,factor=3,steps=210", nodes=4, steps=210, settings=settings)

    assert [e["kind"] for e in outcome.of("fault_injected")] == ["slow"]
    assert not outcome.of("node_lost")
    slow = [e for e in outcome.of("rank_slow") if e["node"] == 1]
    assert slow
    assert slow[0]["weight"] < 1.0
    assert any(e["reason"] == "speed" for e in outcome.of("reconfigured"))
    outcome.assert_exactly_once(210)


@pytest.mark.slow
def test_a_node_that_comes_takes_part_and_can_be_lost_again(run: Any) -> None:
    outcome = run("join@2", "kill:4@30", nodes=4, steps=34, settings=QUICK)

    assert {e["node"] for e in outcome.of("node_joined")} == {4}
    assert {e["node"] for e in outcome.of("node_lost")} == {4}
    sizes = {e["num_nodes"] for e in outcome.of("step_committed")}
    assert sizes == {4, 5}
    outcome.assert_exactly_once(34)


@pytest.mark.slow
def test_everybody_may_go_but_one(run: Any) -> None:
    faults = ("kill:1@3", "kill:2@4", "leave:3@6")
    settings = (*QUICK, "placement.slots_per_node=6")
    outcome = run(*faults, nodes=4, steps=STEPS, settings=settings)

    assert {e["node"] for e in outcome.of("node_lost")} == {1, 2}
    assert {e["node"] for e in outcome.of("node_left")} == {3}
    assert outcome.of("step_committed")[-1]["num_nodes"] == 1
    outcome.assert_exactly_once(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["reconfigure", "transfer"])
def test_a_loss_inside_a_reconfiguration_starts_the_next_one(run: Any, phase: str) -> None:
    outcome = run("kill:2@4", f"kill:1@4/{phase}", nodes=4, steps=STEPS, settings=QUICK)

    assert {(e["node"], e["phase"]) for e in outcome.of("fault_injected")} == {
        (2, "forward"),
        (1, phase),
    }
    assert {e["node"] for e in outcome.of("node_lost")} == {1, 2}
    outcome.assert_exactly_once(STEPS)
    last = max(e["generation"] for e in outcome.of("reconfigured"))
    base = outcome.resumed_at(last)
    left = run(f"leave:1@{base + 1}", f"leave:2@{base + 1}", nodes=4, steps=STEPS)
    assert outcome.digest == left.digest

"""Losses while the loss before is being repaired, and more losses than one at a time."""

from __future__ import annotations

from typing import Any

import pytest

STEPS = 7
BEFORE = ("recovery.heal=before",)  # so that transfers are part of the recovery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("phase", ["reconfigure", "transfer"])
@pytest.mark.parametrize("second", [0, 3], ids=["first", "last"])
def test_a_loss_during_a_reconfiguration_starts_the_next_one(
    run: Any, phase: str, second: int
) -> None:
    faults = ("kill:2@4/grad_sync", f"kill:{second}@4/{phase}")
    outcome = run(*faults, nodes=4, steps=STEPS, settings=BEFORE)
    fired = [(e["node"], e["phase"]) for e in outcome.of("fault_injected")]
    assert fired == [(2, "grad_sync"), (second, phase)]
    assert {e["node"] for e in outcome.of("node_lost")} == {2, second}
    outcome.assert_exactly_once(STEPS)
    healed = outcome.of("reconfigured")[-1]
    assert healed["attempts"] >= 2 and sorted(healed["lost"]) == sorted([2, second])
    if not outcome.of("expert_restored"):
        base = outcome.resumed_at(healed["generation"])
        leaves = (f"leave:{node}@{base + 1}" for node in (2, second))
        left = run(*leaves, nodes=4, steps=STEPS, settings=BEFORE)
        assert outcome.digest == left.digest


def test_a_third_loss_in_one_recovery_is_survived(run: Any) -> None:
    faults = ("kill:1@4/commit", "kill:2@4/reconfigure", "kill:3@4/reconfigure")
    outcome = run(*faults, steps=STEPS)
    assert {e["node"] for e in outcome.of("node_lost")} == {1, 2, 3}
    outcome.assert_exactly_once(STEPS)
    assert outcome.of("step_committed")[-1]["num_nodes"] == 2


def test_two_losses_in_one_step_at_different_places(run: Any) -> None:
    outcome = run("kill:1@4/forward", "kill:3@4/commit", steps=STEPS)
    assert {e["node"] for e in outcome.of("fault_injected")} == {1, 3}
    outcome.assert_exactly_once(STEPS)


def test_everybody_gone_but_one(run: Any) -> None:
    faults = [f"kill:{node}@{step}" for node, step in ((0, 3), (1, 3), (3, 4), (4, 5))]
    outcome = run(*faults, steps=STEPS, settings=["placement.slots_per_node=6"])
    assert {e["node"] for e in outcome.of("node_lost")} == {0, 1, 3, 4}
    outcome.assert_exactly_once(STEPS)
    assert outcome.of("step_committed")[-1]["num_nodes"] == 1

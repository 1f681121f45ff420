"""Policies of a user in real runs: asked in the controller's process, and survived."""

from __future__ import annotations

from typing import Any

import pytest

from lazarus.errors import LostExpertError

pytestmark = pytest.mark.slow


PAIR = ("kill:0@14", "kill:1@14")  # the only two holders of some experts in the plan below
SETTINGS = ("placement.slots_per_node=3", "checkpoint.every=4", "checkpoint.k_persist=2")
HERE = "user_policies"


def test_a_placement_policy_that_fails_after_a_loss_is_passed_over(run: Any) -> None:
    outcome = run("kill:1@6", nodes=4, steps=12, settings=(f"placement.policy={HERE}:GivesUp",))
    outcome.assert_exactly_once(12)
    (fallback,) = outcome.of("plan_fallback")
    assert fallback["reason"] == "placement.policy: RuntimeError: lost [1], and no idea"
    assert outcome.of("plan_adopted")[-1]["nodes"] == [0, 2, 3]


def test_a_recovery_policy_chooses_where_lost_experts_come_back_from(run: Any) -> None:
    outcome = run(*PAIR, nodes=4, steps=18, settings=(*SETTINGS, f"recovery.policy={HERE}:Oldest"))
    outcome.assert_exactly_once(18)
    restored = outcome.of("expert_restored")
    assert restored
    assert {event["source"] for event in restored} == {"initial"}
    assert {event["behind_steps"] for event in restored} == {13}
    assert not outcome.of("plan_fallback")


def test_a_recovery_policy_may_stop_the_run_which_can_be_resumed(run: Any) -> None:
    settings = (*SETTINGS, f"recovery.policy={HERE}:stop")
    with pytest.raises(LostExpertError, match=r"experts at step 13"):
        run(*PAIR, nodes=4, steps=18, settings=settings)

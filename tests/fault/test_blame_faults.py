"""Faults on purpose: they strike whoever lives, or the record says why they did not."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_join_on_purpose_happens_though_node_0_is_gone(run: Any) -> None:
    """B4: node 0 was killed; joins at later steps name nobody, so the lowest rank strikes them."""
    faults = ("kill:0@3", "join@8", "controller@12", "join@16,count=2")
    outcome = run(*faults, nodes=3, steps=24)
    fired = outcome.of("fault_injected")
    assert [e["spec"] for e in fired] == list(faults)
    assert [e["node"] for e in fired] == [0, 1, 1, 1]
    assert [e["node"] for e in outcome.of("node_lost")] == [0]
    assert [e["node"] for e in outcome.of("node_joined")][:1] == [3]
    assert not outcome.of("fault_not_fired")
    outcome.assert_exactly_once(24)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_faults_that_never_happen_are_said_with_the_reason(run: Any) -> None:
    """B4: the record of a drill tells what of it did not take place."""
    faults = ("kill:2@3", "slow:2@5,factor=2,steps=2", "kill:1@4/transfer")
    outcome = run(*faults, nodes=3, steps=8, settings=["cluster.replace_lost=false"])
    assert next(e["spec"] for e in outcome.of("fault_injected")) == "kill:2@3"
    assert {e["spec"]: e["reason"] for e in outcome.of("fault_not_fired")} == {
        "slow:2@5,factor=2,steps=2": "node 2 was gone before",
        "kill:1@4/transfer": "no transfer came after step 4",
    }

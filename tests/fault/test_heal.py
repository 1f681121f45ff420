"""Refilling lost replicas behind training changes when bytes move, never the bits."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.slow
def test_healing_behind_training_ends_in_the_bits_of_healing_before(run: Any) -> None:
    before = run("kill:2@4", nodes=4, steps=9, settings=["recovery.heal=before"])
    behind = run("kill:2@4", nodes=4, steps=9, settings=["recovery.heal=behind"])

    (first,), (second,) = before.of("reconfigured"), behind.of("reconfigured")
    assert first["moves"] > 0 and first["moves_behind"] == 0
    assert second["moves"] == 0 and second["moves_behind"] == first["moves"]
    assert second["bytes_moved"] == 0
    (healed,) = behind.of("healed")
    assert healed["bytes_moved"] == first["bytes_moved"]
    behind.assert_exactly_once(9)
    assert behind.digest == before.digest


@pytest.mark.slow
def test_a_loss_while_replicas_are_refilled_behind_is_a_loss_like_any_other(run: Any) -> None:
    outcome = run(
        "kill:2@4", "kill:1@4/transfer", nodes=4, steps=9, settings=["recovery.heal=behind"]
    )

    assert {e["node"] for e in outcome.of("node_lost")} == {1, 2}
    assert any(e["phase"] == "transfer" for e in outcome.of("fault_injected"))
    outcome.assert_exactly_once(9)
    left = run("leave:2@4", "leave:1@5", nodes=4, steps=9)
    last = max(e["generation"] for e in outcome.of("reconfigured"))
    if outcome.resumed_at(last) == 4:
        assert outcome.digest == left.digest

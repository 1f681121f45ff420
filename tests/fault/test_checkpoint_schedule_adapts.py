"""checkpoint.every=auto in a real run: measured rates set the interval, and the record says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import Event, Watched, watch


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_interval_follows_measured_rates_and_checkpoints_come_at_it(tmp_path: Path) -> None:
    seen: list[Event] = []

    def stop_after_two(watched: Watched, event: Event) -> None:
        if event["event"] in ("checkpoint_adapted", "checkpoint_persisted"):
            seen.append(event)
        kinds = [e["event"] for e in seen]
        if "checkpoint_adapted" in kinds and len(kinds) - kinds.index("checkpoint_adapted") == 4:
            watched.stop()

    watched = watch(
        tmp_path,
        nodes=3,
        steps=100_000,
        settings=("checkpoint.every=auto", "model.experts=16", "placement.slots_per_node=16"),
        on_event=stop_after_two,
    )
    assert watched.status == "stopped"
    (adapted,) = watched.of("checkpoint_adapted")
    assert adapted["step"] >= 200  # the first checkpoint comes at the default interval
    every = adapted["persist_every"]
    assert every < 200 and adapted["copy_rate"] > 0 and adapted["window_s"] > 0
    later = [e["step"] for e in seen if e["event"] == "checkpoint_persisted"]
    later = [step for step in later if step > adapted["step"]]
    assert len(later) >= 2 and all(step % every == 0 for step in later)
    assert watched.steps == list(range(1, watched.steps[-1] + 1))
    reasons = [e["reason"] for e in watched.of("reconfigured")]
    assert reasons.count("checkpoint schedule") == 1
    assert set(reasons) <= {"checkpoint schedule", "rebalance", "speed"}  # what clocks decide

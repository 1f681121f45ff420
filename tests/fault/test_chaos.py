"""Random faults of every kind in one run: what the record says happened, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, watch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MOST = "kill+stop+stall+slow+leave+join+controller+join+join+join"  # joins keep nodes there


@pytest.mark.parametrize(
    ("kinds", "seed", "enough"), [(MOST, 1, 25), (MOST, 2, 25), ("crash", 1, 2), ("leave", 3, 2)]
)
def test_a_run_survives_random_faults(tmp_path: Path, kinds: str, seed: int, enough: int) -> None:
    struck: list[str] = []
    gone = len(struck)

    def count(run: Watched, event: Any) -> None:
        nonlocal gone
        if event["event"] == "fault_injected":
            struck.append(event["kind"])
        gone += event["event"] in ("node_lost", "node_left")
        if event["event"] == "step_committed" and len(struck) >= enough and gone:
            run.stop()

    run = watch(
        tmp_path,
        nodes=5,
        steps=1_000_000,
        on_event=count,
        settings=[
            f"faults.chaos=mtbf=1s,seed={seed},kinds={kinds}",
            "cluster.max_nodes=8",
            "placement.slots_per_node=6",  # any node holds all: no run of bad luck loses an expert
            "recovery.tolerated_stall_s=1.0",
        ],
    )
    assert run.status == "stopped"
    assert run.steps == list(range(1, len(run.steps) + 1))
    assert set(struck) <= set(kinds.split("+"))
    if kinds == MOST:
        assert len(set(struck)) >= 6, struck
        assert run.of("node_lost") and run.of("node_joined")

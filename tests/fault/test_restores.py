"""When the last replicas of an expert die: what comes back, from where, and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazarus.record.loads import counts_of_run

PAIR = ("kill:0@14", "kill:1@14")  # the only two holders of some experts in the plan below
SETTINGS = ("placement.slots_per_node=3", "checkpoint.every=4", "checkpoint.k_persist=2")


def _holders(outcome: Any, layer: int, expert: int) -> set[int]:
    plan = outcome.of("plan_adopted")[0]
    ranks = plan["experts_of_rank"][layer]
    return {node for node, held in zip(plan["nodes"], ranks, strict=True) if expert in held}


def _recounted_plt(outcome: Any) -> float:
    """PLT from the routing counts and the events alone: mean over layers of lost / routed."""
    trace = counts_of_run(outcome.folder)
    assert trace is not None
    counts = trace.counts
    lost = np.zeros(counts.shape[1])
    for event in outcome.of("expert_restored"):
        last = event["step"]
        first = last - event["behind_steps"]
        lost[event["layer"]] += counts[first:last, event["layer"], event["expert"]].sum()
    return float((lost / counts.sum(axis=(0, 2))).mean())


@pytest.mark.slow
def test_lost_experts_come_back_from_memory_and_the_bill_is_right(run: Any) -> None:
    outcome = run(*PAIR, nodes=4, steps=18, settings=SETTINGS)

    restored = {(e["layer"], e["expert"]): e for e in outcome.of("expert_restored")}
    gone = {
        (layer, expert)
        for layer in range(2)
        for expert in range(6)
        if _holders(outcome, layer, expert) <= {0, 1}
    }
    assert gone
    assert set(restored) == gone  # no other expert is stale
    assert {e["source"] for e in restored.values()} <= {"own_snapshot", "node_snapshot", "storage"}
    assert any(e["source"] != "storage" for e in restored.values())
    outcome.assert_exactly_once(18)
    (finished,) = outcome.of("run_finished")
    assert finished["plt"] == pytest.approx(_recounted_plt(outcome), rel=1e-9)


@pytest.mark.slow
def test_without_copies_in_memory_storage_gives_the_experts_back(run: Any) -> None:
    outcome = run(*PAIR, nodes=4, steps=18, settings=(*SETTINGS, "checkpoint.copies=0"))

    sources = {e["source"] for e in outcome.of("expert_restored")}
    assert "storage" in sources
    outcome.assert_exactly_once(18)
    (finished,) = outcome.of("run_finished")
    assert finished["plt"] == pytest.approx(_recounted_plt(outcome), rel=1e-9)


@pytest.mark.slow
def test_the_policy_to_fail_ends_the_run_resumable(run: Any) -> None:
    from lazarus.errors import LostExpertError

    with pytest.raises(LostExpertError) as caught:
        run(*PAIR, nodes=4, steps=18, settings=(*SETTINGS, "recovery.on_lost_expert=fail"))
    assert caught.value.exit_code == 3
    assert caught.value.experts


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit_on_the_same_nodes(run: Any, tmp_path: Path) -> None:
    from lazarus import ElasticTrainer, TrainConfig

    settings = ("checkpoint.full_at_end=true", "optim.schedule=constant", "optim.warmup_steps=0")
    first = run(nodes=3, steps=6, settings=settings)
    whole = run(nodes=3, steps=12, settings=settings)
    config = TrainConfig.load(
        overrides=[
            *run.small,
            "cluster.nodes=3",
            "train.steps=12",
            *settings,
            f"run.dir={tmp_path}",
        ]
    )
    resumed = ElasticTrainer(config).fit(resume=first.folder)
    assert resumed.state_digest == whole.digest
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert any(json.loads(line)["event"] == "run_resumed" for line in lines)


@pytest.mark.slow
def test_a_resumed_run_remembers_what_its_earlier_life_lost(run: Any, tmp_path: Path) -> None:
    """R10: the portion of lost tokens is the run's, over its lives, and so is its budget."""
    from lazarus import ElasticTrainer, TrainConfig

    settings = (*SETTINGS, "checkpoint.full_at_end=true")
    first = run(*PAIR, nodes=4, steps=18, settings=settings)
    (finished,) = first.of("run_finished")
    assert first.of("expert_restored") and finished["plt"] > 0
    config = TrainConfig.load(
        overrides=[
            *run.small,
            "cluster.nodes=4",
            "train.steps=24",
            *settings,
            f"run.dir={tmp_path}",
        ]
    )
    result = ElasticTrainer(config).fit(resume=first.folder)
    # Every step routes as many copies: what was lost is a smaller part of more steps.
    assert result.plt == pytest.approx(finished["plt"] * 18 / 24, rel=1e-9)

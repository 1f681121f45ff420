"""The goodput benchmark: its schedules, its systems and what it counts."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lazarus.config import TrainConfig

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "goodput_under_faults.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("goodput_under_faults", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def options(**more: Any) -> argparse.Namespace:
    given = {"nodes": 6, "period": 25.0, "full_every": 25, "ft_every": 75, "time_scale": 1.0}
    return argparse.Namespace(**{**given, **more})


@pytest.mark.parametrize("schedule", ["periodic", "poisson"])
def test_half_of_the_nodes_die_within_the_window(bench: ModuleType, schedule: str) -> None:
    for seed in range(5):
        made = getattr(bench, schedule)(options(), seed)
        assert len(made.kills_s) <= 3 and made.wall_s == 100
        assert all(0 < at_s < made.wall_s for at_s in made.kills_s)
        assert made == getattr(bench, schedule)(options(), seed)


def test_a_spot_trace_gives_the_moments(bench: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    lines = [f"0,add,n{i}" for i in range(6)] + ["60000,remove,n1", "80000,remove,n2"]
    trace.write_text("\n".join(lines))
    made = bench.traced(options(trace=str(trace)), 0)
    assert made.kills_s == (5.0, 25.0)


def test_every_system_has_a_valid_configuration(bench: ModuleType, tmp_path: Path) -> None:
    made = bench.periodic(options(), 0)
    for system in "abc":
        for live in (6, 5, 4, 3):
            nodes = bench.usable(system, live)
            texts = bench.overrides(system, made, tmp_path, nodes=nodes, seed=1)
            assert TrainConfig.load(overrides=texts).cluster.nodes == nodes
    assert [bench.usable("b", live) for live in (6, 5, 4, 3)] == [6, 4, 4, 3]


def test_rolled_back_and_late_steps_do_not_count(bench: ModuleType, tmp_path: Path) -> None:
    def commit(t: float, step: int) -> dict[str, Any]:
        return {"t": t, "event": "step_committed", "generation": 1, "step": step, "loss": 1.0,
                "tokens": 10, "num_nodes": 2, "wall_s": 1.0}  # fmt: skip

    events = [commit(0, 1), commit(1, 2), commit(2, 3), commit(3, 2), commit(4, 3), commit(99, 4)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    made = bench.Plan(name="x", nodes=2, wall_s=10.0, kills_s=(), every_b=1, every_c=1)
    found = bench.figures(tmp_path, 0.0, made)
    assert found["goodput_tokens_per_s"] == 2.0  # steps 2 and 3, the second time
    assert (found["steps"], found["steps_lost"]) == (3, 2)


def test_ratios_are_medians_of_pairs_with_the_same_seed(bench: ModuleType) -> None:
    rows = [
        {"system": name, "seed": seed, "goodput_tokens_per_s": value, "ettr": 0.5,
         "steps_lost": 0, "loss": 1.0}
        for name, values in (("Lazarus", (6, 8, 9)), ("DS", (2, 4, 1)))
        for seed, value in enumerate(values)
    ]  # fmt: skip
    ours, ds = bench.summarise(rows)
    assert ours["lazarus_over_it"] == 1 and ds["lazarus_over_it"] == 3


def test_a_peer_that_is_not_installed_is_named(bench: ModuleType) -> None:
    for system, package in (("d", "deepspeed"), ("e", "torchft")):
        assert package in bench.goodput_peers.missing(system, "false")
    assert not bench.goodput_peers.missing("a", "false")


def test_steps_of_a_peer_that_it_went_back_over_do_not_count(bench: ModuleType) -> None:
    def commit(t: float, step: int, part: int = 0) -> dict[str, Any]:
        return {
            "t": t,
            "step": step,
            "part": part,
            "tokens": 10,
            "loss": float(part),
            "wall_s": 1.0,
        }

    lines = [
        {"t": -1.0, "resumed": 0}, commit(0, 1), commit(1, 2), commit(2, 3),
        {"t": 3.0, "resumed": 1}, commit(4, 2), commit(5, 3), commit(5, 3, 1), commit(99, 4),
    ]  # fmt: skip
    found = bench.goodput_peers.figures(lines, began=0.0, wall_s=10.0, kills=1)
    assert found["goodput_tokens_per_s"] == 3.0  # step 2 again, step 3 by two parts
    assert (found["steps"], found["steps_lost"], found["ettr"]) == (3, 2, 0.2)
    assert found["loss"] == 0.5 and found["kills"] == 1


def test_peers_train_the_same_model(bench: ModuleType) -> None:
    sys.path.insert(0, str(SCRIPT.parent / "peers"))
    work = importlib.import_module("same_work")
    config = TrainConfig.load(overrides=list(bench.MODEL))
    for name in ("layers", "dim", "heads", "vocab", "seq_len", "experts", "top_k", "ffn_mult",
                 "moe_every"):  # fmt: skip
        assert getattr(work.SHAPE, name) == getattr(config.model, name)
    assert (config.train.global_batch, config.optim.warmup_steps) == (work.BATCH, work.WARMUP)
    assert (config.optim.lr, config.optim.clip_norm) == (work.LR, work.CLIP)
    samples = work.Samples(0)
    parts = [samples.tokens(3, part=r, parts=4, count=4) for r in range(4)]
    assert len({tuple(row.tolist()) for part in parts for row in part}) == 16
    assert samples.tokens(3, part=5, parts=6, count=3).shape == (3, 65)

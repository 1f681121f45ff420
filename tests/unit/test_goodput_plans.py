"""The goodput benchmark: its schedules, its systems, what is modelled and what it counts."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lazarus.config.train_config import TrainConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def plans() -> ModuleType:
    return module("goodput_plans")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return module("goodput_tables")


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    return module("goodput_shapes")


def options(**more: Any) -> argparse.Namespace:
    given = {"nodes": 6, "period": 25.0, "time_scale": 1.0, "shape": "s", "device_ms": 25.0,
             "write_s": None, "jitter": 0.2}  # fmt: skip
    return argparse.Namespace(**{**given, **more})


@pytest.mark.parametrize("schedule", ["periodic", "poisson"])
def test_half_of_the_nodes_die_within_the_window(plans: ModuleType, schedule: str) -> None:
    for seed in range(5):
        made = getattr(plans, schedule)(options(), seed)
        assert len(made.kills_s) <= 3 and made.wall_s == 100
        assert all(0 < at_s < made.wall_s for at_s in made.kills_s)
        assert made == getattr(plans, schedule)(options(), seed)


def test_gaps_between_kills_are_the_period_or_as_jittered(plans: ModuleType) -> None:
    for seed in range(5):
        for jitter in (0.0, 0.2):
            kills = plans.periodic(options(jitter=jitter), seed).kills_s
            assert 20 <= kills[0] <= 30
            for before, after in pairwise(kills):
                assert abs(after - before - 25) <= 25 * jitter + 1e-9
    assert len({plans.periodic(options(jitter=0.0), seed).kills_s for seed in range(5)}) == 5


def test_a_spot_trace_gives_the_moments(plans: ModuleType, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    lines = [f"0,add,n{i}" for i in range(6)] + ["60000,remove,n1", "80000,remove,n2"]
    trace.write_text("\n".join(lines))
    made = plans.traced(options(trace=str(trace)), 0)
    assert made.kills_s == (5.0, 25.0) and made.left_out == ""


def test_what_a_spot_trace_holds_beyond_the_kills_is_counted(
    plans: ModuleType, tmp_path: Path
) -> None:
    trace = tmp_path / "t.csv"
    lines = [f"0,add,n{i}" for i in range(6)] + [f"{60 + i}000,remove,n{i}" for i in range(5)]
    trace.write_text("\n".join([*lines, "70000,add,x", "70000,add,y"]))
    made = plans.traced(options(trace=str(trace)), 0)
    assert made.kills_s == (5.0, 6.0, 7.0)
    said = "2 nodes that the trace adds, 2 that it removes later"
    assert made.left_out == said and f"left out: {said}" in plans.assumptions(made)
    assert "left out" not in plans.assumptions(plans.periodic(options(), 0))


@pytest.mark.parametrize(
    "given", [["--schedule", "trace"], ["--trace", "t.csv"],
              ["--schedule", "trace", "--trace", "missing.csv"]]
)  # fmt: skip
def test_a_schedule_and_its_trace_need_each_other(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["goodput_under_faults.py", *given])
    with pytest.raises(SystemExit) as ended:
        module("goodput_under_faults").arguments()
    assert ended.value.code == 2 and "--trace" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("shape", ["s", "l"])
def test_every_system_has_a_valid_configuration(
    plans: ModuleType, tmp_path: Path, shape: str
) -> None:
    made = plans.periodic(options(shape=shape), 0)
    for system in "abBcC":
        for live in (6, 5, 4, 3):
            nodes = plans.usable(system, made, live)
            texts = plans.overrides(system, made, tmp_path, nodes=nodes, seed=1)
            config = TrainConfig.load(overrides=texts)
            assert config.cluster.nodes == nodes
            assert (config.cluster.launcher == "cold") == (system in "bB")
    warm = plans.overrides("b", made, tmp_path, nodes=6, seed=1, is_warm=True)
    assert TrainConfig.load(overrides=warm).cluster.launcher == "process"


def test_fixed_expert_parallelism_leaves_nodes_idle(plans: ModuleType) -> None:
    used = {
        shape: [plans.usable("b", plans.periodic(options(shape=shape), 0), n) for n in (6, 5, 4, 3)]
        for shape in "sl"
    }
    assert used == {"s": [6, 4, 4, 3], "l": [4, 4, 4, 2]}


def test_times_keep_the_testbeds_share_of_the_fault_period(shapes: ModuleType) -> None:
    for shape in shapes.SHAPES.values():
        for period_s in (20.0, 30.0):
            made = shapes.timing(shape, period_s=period_s, nodes=6, device_ms=25.0)
            bed = shape.testbed
            assert made.write_s / period_s == pytest.approx(bed.write_s / bed.period_s)
            first_step_s = 24 / shape.usable(6) * made.device_s
            own = made.every_b * first_step_s / period_s
            assert own == pytest.approx(bed.every * bed.step_s / bed.period_s, rel=0.03)
            assert made.every_c * 0.1 == pytest.approx(5 * own * period_s, rel=0.03)


def test_without_devices_and_storage_nothing_is_modelled(shapes: ModuleType) -> None:
    made = shapes.timing(shapes.SHAPES["l"], period_s=25.0, nodes=6, device_ms=0.0, write_s=0.0)
    assert (made.device_s, made.write_s, made.every_b, made.every_c) == (0, 0, 50, 250)


def test_the_best_interval_costs_no_more_than_its_neighbours(shapes: ModuleType) -> None:
    def cost(every: int) -> float:  # per second: saves, and half an interval lost at each fault
        return 1.6 / (every * 0.1) + every * 0.1 / 2 / 25

    best = shapes.best_every(save_s=1.6, period_s=25.0, step_s=0.1)
    assert cost(best) <= min(cost(best - 1), cost(best + 1))


def commit(t: float, step: int) -> dict[str, Any]:
    return {"t": t, "event": "step_committed", "generation": 1, "step": step, "loss": 1.0,
            "tokens": 10, "num_nodes": 2, "wall_s": 1.0}  # fmt: skip


def record(folder: Path, events: list[dict[str, Any]]) -> None:
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def window(plans: ModuleType, wall_s: float) -> Any:
    return SimpleNamespace(wall_s=wall_s)


def test_rolled_back_and_late_steps_do_not_count(
    plans: ModuleType, tables: ModuleType, tmp_path: Path
) -> None:
    events = [commit(0, 1), commit(1, 2), commit(2, 3), commit(3, 2), commit(4, 3), commit(99, 4)]
    record(tmp_path / "run", events)
    found = tables.figures(tmp_path / "run", 0.0, window(plans, 10.0))
    assert found["goodput_tokens_per_s"] == 2.0  # steps 2 and 3, the second time
    assert (found["steps"], found["steps_lost"]) == (3, 2)


def test_stalls_are_told_apart(plans: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    def started(t: float) -> dict[str, Any]:
        return {"t": t, "event": "run_started", "generation": 0, "num_nodes": 2, "world_size": 2,
                "schema": 1}  # fmt: skip

    def reconfigured(t: float) -> dict[str, Any]:
        return {"t": t, "event": "reconfigured", "generation": 1, "reason": "lost",
                "num_nodes": 2, "moves": 0, "bytes_moved": 5, "wall_s": 1.0,
                "phases": {"groups": 0.5}}  # fmt: skip

    first = [started(-2), reconfigured(-1), commit(0, 1), reconfigured(1), commit(2, 2)]
    record(tmp_path / "run", [*first, started(5), reconfigured(6), commit(7, 2)])
    waits = [{"t": 1.5, "save_s": 0.25}, {"t": 2.5, "read_s": 2.0}, {"t": 50, "save_s": 9.0}]
    tables.waits_of(tmp_path / "run").write_text("".join(json.dumps(w) + "\n" for w in waits))
    found = tables.figures(tmp_path / "run", 0.0, window(plans, 10.0))
    assert found["stall_s_by_phase"] == {"groups": 0.5, "save": 0.25, "read": 2.0, "restart": 5.0}
    assert (found["save_s"], found["restart_s"]) == (0.25, 5.0)


def test_ratios_are_medians_of_pairs_with_the_same_seed(tables: ModuleType) -> None:
    rows = [
        {"system": name, "seed": seed, "goodput_tokens_per_s": value, "ettr": 0.5, "plt": 0.0,
         "steps_lost": 0, "loss": 1.0, "cpu": 0.5, "step_s": 0.1, "save_s": 1.0, "restart_s": 2.0,
         "every": every, "stall_s_by_phase": {"save": 1.0, "restart": 2.0}}
        for name, every, values in (("Lazarus", 0, (6, 8, 9)), ("DS", 25, (2, 4, 1)))
        for seed, value in enumerate(values)
    ]  # fmt: skip
    ours, ds = tables.summarise(rows)
    assert ours["lazarus_over_it"] == 1 and ds["lazarus_over_it"] == 3 and ds["stall_s"] == 3
    assert len({len(text) for text in tables.table([ours, ds]).splitlines()}) == 1


def test_a_peer_that_is_not_installed_is_named() -> None:
    peers = module("goodput_peers")
    for system, package in (("d", "deepspeed"), ("e", "torchft")):
        assert package in peers.missing(system, "false")
    assert not peers.missing("a", "false")


def test_steps_of_a_peer_that_it_went_back_over_do_not_count(tables: ModuleType) -> None:
    def step(t: float, number: int, part: int = 0) -> dict[str, Any]:
        return {"t": t, "step": number, "part": part, "tokens": 10, "loss": float(part),
                "wall_s": 1.0}  # fmt: skip

    lines = [
        {"t": -1.0, "resumed": 0}, step(0, 1), step(1, 2), {"t": 1.5, "save_s": 0.5}, step(2, 3),
        {"t": 3.0, "resumed": 1}, step(4, 2), step(5, 3), step(5, 3, 1), step(99, 4),
    ]  # fmt: skip
    found = tables.peer_figures(lines, began=0.0, wall_s=10.0, kills=1)
    assert found["goodput_tokens_per_s"] == 3.0  # step 2 again, step 3 by two parts
    assert (found["steps"], found["steps_lost"], found["ettr"]) == (3, 2, 0.2)
    assert found["loss"] == 0.5 and found["kills"] == 1
    assert found["stall_s_by_phase"] == {"save": 0.5, "restart": 2.0}


def test_peers_train_the_same_model(plans: ModuleType, tmp_path: Path) -> None:
    same = module("same_work")
    spec = {"shape": "s", "seed": 0, "every": 5, "write_s": 0.0,
            "device": {"sample_s": 0.0, "expert_part": 0.4, "rows": 64}}  # fmt: skip
    work = same.Work.of(json.dumps(spec))
    made = plans.periodic(options(), 0)
    config = TrainConfig.load(overrides=plans.overrides("a", made, tmp_path, nodes=6, seed=0))
    for name in ("layers", "dim", "heads", "vocab", "seq_len", "experts", "top_k", "ffn_mult",
                 "moe_every"):  # fmt: skip
        assert getattr(work.shape, name) == getattr(config.model, name)
    assert config.train.global_batch == work.shape.batch
    assert config.optim.warmup_steps == same.WARMUP
    assert (config.optim.lr, config.optim.clip_norm) == (same.LR, same.CLIP)
    samples = same.Samples(work)
    parts = [samples.tokens(3, part=r, parts=4, count=6) for r in range(4)]
    assert len({tuple(row.tolist()) for part in parts for row in part}) == 24
    assert samples.tokens(3, part=5, parts=6, count=3).shape == (3, 33)


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.now += seconds


def test_a_device_takes_its_time_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    device = module("goodput_modelled").Device(0.025, expert_part=0.5, rows=10)
    device.begin(4)
    device.serve(30)
    device.serve(10)  # as many as its own samples make
    clock.now += 0.03  # the real work, inside
    device.finish()
    assert clock.now == pytest.approx(100.1)
    device.begin(4)
    device.serve(80)  # its experts are wanted twice as much
    device.finish()
    assert clock.now == pytest.approx(100.25)
    device.begin(1)
    clock.now += 1.0  # slower than the device
    device.finish()
    assert clock.now == pytest.approx(101.25)


def test_training_waits_for_saves_and_for_what_a_rollback_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock(monkeypatch)
    log = tmp_path / "waits"
    modelled = module("goodput_modelled").Modelled(
        device=None, write_s=2.0, every=2, url=tmp_path, log=log, reads=False
    )
    first, other = SimpleNamespace(rank=0), SimpleNamespace(rank=1)
    modelled.on_commit(first, 1)
    assert clock.now == 100.0
    modelled.on_commit(first, 2)
    assert clock.now == 102.0
    modelled.on_commit(first, 1)  # behind the last: everything was read anew
    assert clock.now == 104.0
    modelled.on_commit(other, 2)  # all wait, the first rank notes it
    assert clock.now == 106.0
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    assert [{k: v for k, v in x.items() if k != "t"} for x in noted] == [
        {"save_s": 2.0}, {"read_s": 2.0}
    ]  # fmt: skip


def test_the_device_is_busy_until_the_last_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from lazarus.model import gpt, routed

    clock = Clock(monkeypatch)
    monkeypatch.setattr(routed, "expert_path", routed.expert_path)  # put back at the end
    tools = module("goodput_modelled")
    modelled = tools.Modelled(
        device=tools.Device(0.5, expert_part=0.5, rows=4),
        write_s=0.0, every=0, url=Path(), log=Path(), reads=False,
    )  # fmt: skip
    shape = gpt.GPTConfig(
        layers=2, dim=8, heads=2, vocab=16, seq_len=4, experts=2, top_k=1, ffn_mult=2, moe_every=2
    )
    model = gpt.build(shape)
    modelled.on_setup(SimpleNamespace(rank=0), model)
    total = modelled.loss(model, {"tokens": torch.zeros(3, 5, dtype=torch.int64)}).total
    assert clock.now == 100.0
    total.backward()
    assert clock.now == pytest.approx(101.5)  # all experts are here: three samples' time

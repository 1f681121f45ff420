"""One command, one answer: replica budget, size, memory and money."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import simulate

from lazarus.cli import main
from lazarus.record.loads import uniform_load
from lazarus.simulate.inputs.costs import PROFILES
from lazarus.simulate.inputs.faults import Poisson, Scripted, node_hours
from lazarus.simulate.inputs.shapes import SHAPES
from lazarus.simulate.inputs.traces import FleetEvent
from lazarus.simulate.rows import Row, Setting
from lazarus.simulate.studies.calibrate import line
from lazarus.simulate.studies.findings import cost_of, findings, table

ROOT = Path(__file__).resolve().parents[2]


def row(**more: Any) -> Row:
    setting = Setting(
        name="gpt-s x 4", shape=SHAPES["gpt-s"], costs=PROFILES["h200-8x400g"],
        load=uniform_load(1, 8), faults=Poisson(node_mtbf_s=1e9), num_nodes=4, slots_per_node=4,
        horizon_s=3600.0, tokens_per_step=4096.0, placed_layers=1,
    )  # fmt: skip
    (found,) = simulate(setting, policies=["lazarus"])
    return replace(found, **more)


def test_a_row_says_what_a_node_holds_and_how_long_nodes_were_paid_for() -> None:
    shape, found = SHAPES["gpt-s"], row()
    state = 4 * shape.moe_layers * shape.expert_bytes + shape.dense_bytes
    assert found.state_bytes_per_node == pytest.approx(state)
    assert (found.num_nodes, found.slots_per_node, found.min_replicas) == (4, 4, 2)
    assert found.node_hours == pytest.approx(4.0)
    gone = FleetEvent(at_s=1800.0, kind="remove", nodes=("n0", "n1"))
    hours = node_hours(Scripted(script=(gone,)), num_nodes=4, length_s=3600.0, seed=0)
    assert hours == pytest.approx(3.0)


def test_a_billion_tokens_cost_the_node_hours_that_they_took() -> None:
    found = row(tokens=2e9, node_hours=10.0)
    assert cost_of(found, 3.0) == 15.0
    assert "15" in table([found], price=3.0)[1]
    assert findings([found], price=3.0)[-1].endswith(
        "15 for a billion tokens, 30 for 10 node hours"
    )
    assert cost_of(row(tokens=0.0), 3.0) == float("inf")


def test_scaling_stops_where_a_node_brings_too_little() -> None:
    sizes = ((8, 800.0), (64, 6000.0), (512, 20_000.0))
    rows = [row(num_nodes=n, goodput_tokens_per_s=tokens) for n, tokens in sizes]
    (said,) = findings(rows)
    assert "8 nodes 100%, 64 nodes 94%, 512 nodes 39%; stops between 64 and 512" in said
    assert "scales to the largest" in findings(rows[:2])[0]


def test_memory_limits_the_slots_that_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["simulate", "--shape", "gpt-l", "--nodes", "8", "--hours", "0.2", "--layers", "1"]
    assert main([*base, "--memory", "12", "--min-replicas", "1", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    ours = [r for r in answer["rows"] if r["policy"] == "lazarus"]
    assert len({r["slots_per_node"] for r in ours}) > 1
    assert all(r["state_bytes_per_node"] <= 12e9 for r in ours)
    peers = [r["policy"] for r in answer["rows"] if r["policy"] != "lazarus"]
    assert peers == ["ds", "ds-ft"]  # once: they know neither slots nor floors
    assert answer["findings"][0].startswith("most tokens/s: gpt-l x 8, ")
    assert main([*base, "--memory", "2"]) == 2
    assert "GB a node hold each expert once" in capsys.readouterr().err


def test_several_sizes_and_a_spot_trace_are_one_command_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["simulate", "--shape", "gpt-s", "--hours", "0.5", "--policies", "lazarus"]
    assert main([*base, "--nodes", "4", "8", "--layers", "1"]) == 0
    assert "lazarus: tokens/s per node: 4 nodes 100%" in capsys.readouterr().out
    trace = ["--trace", str(ROOT / "examples" / "spot.csv"), "--price", "12"]
    assert main([*base, "--nodes", "10", *trace]) == 0
    assert "cheapest: gpt-s x 10" in capsys.readouterr().out
    for option in ("--memory", "--price"):
        assert main([*base, option, "-1"]) == 2
        assert f"{option} -1.0 must be" in capsys.readouterr().err


def test_the_line_through_recoveries_ignores_an_outlier_and_is_never_negative() -> None:
    assert line([(2, 0.04), (3, 0.05), (4, 0.06), (5, 9.0), (6, 0.08)]) == pytest.approx(
        (0.02, 0.01)
    )
    assert line([(4, 0.3), (4, 0.1), (4, 0.2)]) == (0.2, 0.0)
    assert line([(2, 0.01), (4, 0.04)]) == pytest.approx((0.0, 0.0075))
    assert line([(2, 0.04), (4, 0.01)]) == pytest.approx((0.025, 0.0))


def test_a_slower_machine_takes_longer_for_steps_and_changes_alike() -> None:
    costs = PROFILES["h200-8x400g"].with_steps(((4, 0.1),))
    slow = costs.at_pace(2.0)
    assert slow.grouping_s(8) == 2 * costs.grouping_s(8)
    assert slow.table_step_s(4) == 0.2 and slow.net_bytes_per_s == costs.net_bytes_per_s

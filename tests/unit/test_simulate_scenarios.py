"""The papers' experiments, calibration from records, and a real record predicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import simulate

from lazarus.cli import main
from lazarus.errors import ConfigError
from lazarus.simulate.inputs.faults import FromTrace, Periodic, Poisson, Scripted
from lazarus.simulate.inputs.traces import parse_trace
from lazarus.simulate.rows import FleetPolicy
from lazarus.simulate.studies.calibrate import as_setting, calibrated, measured
from lazarus.simulate.studies.progress import Progress
from lazarus.simulate.studies.scenarios import (
    SCENARIOS,
    Claim,
    Files,
    busiest_window,
    check_claims,
    scenario_named,
)
from lazarus.simulate.studies.tables import TABLES
from lazarus.simulate.systems.policies import run_one

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STEP_S, BACK_S = 0.2, 0.5


def record(nodes: int = 4, kill_after: int = 20, steps: int = 40) -> list[dict[str, Any]]:
    """A made-up run of even steps that loses one node and is back half a second later."""
    events: list[dict[str, Any]] = [
        {"t": 0.0, "event": "run_started", "generation": 1, "num_nodes": nodes, "world_size": nodes,
         "schema": 1, "num_layers": 2, "num_experts": 4},
        {"t": 0.0, "event": "plan_adopted", "generation": 1, "digest": "d", "slots_per_node": 4,
         "requested_floor": 2},
    ]  # fmt: skip
    now, generation, live = 0.0, 1, nodes
    for step in range(1, steps + 1):
        now += STEP_S
        if step == kill_after:
            events += [
                {"t": now - 0.1, "event": "fault_injected", "generation": 1, "node": 2,
                 "kind": "kill", "step": step},
                {"t": now - 0.05, "event": "node_lost", "generation": 1, "node": 2, "cause": "x"},
            ]  # fmt: skip
            now, generation, live = now - 0.1 + BACK_S, 2, nodes - 1
            phases = {"detect": 0.05, "release": 0.02, "align": 0.01, "plan": 0.0, "groups": 0.1,
                      "transfer": 0.02, "redo": 0.3}  # fmt: skip
            events.append(
                {"t": now, "event": "reconfigured", "generation": 2, "reason": "node_lost",
                 "wall_s": BACK_S, "phases": phases, "num_nodes": live, "moves": 0,
                 "bytes_moved": 0, "lost": [2]}
            )  # fmt: skip
        events.append(
            {"t": now, "event": "step_committed", "generation": generation, "step": step,
             "loss": 1.0, "tokens": 100, "num_nodes": live, "wall_s": STEP_S}
        )  # fmt: skip
    return events


def test_a_cost_model_is_read_off_a_record() -> None:
    costs = calibrated([record()])
    assert costs.source == "measured"
    assert dict(costs.step_table_s) == pytest.approx({3: STEP_S, 4: STEP_S})
    assert costs.detect_s == 0.05
    assert costs.groups_s == pytest.approx(0.12)  # with the check of a change that moved nothing
    assert costs.warmup_s == pytest.approx(0.1)


def test_a_calibrated_simulator_predicts_the_run_it_came_from() -> None:
    events = record()
    real = measured(events)
    said = run_one(
        as_setting(events, calibrated([events]), name="r"), FleetPolicy(name="lazarus"), seed=0
    )
    assert said.goodput_tokens_per_s == pytest.approx(real.goodput_tokens_per_s, rel=0.05)
    assert said.recovery_median_s == pytest.approx(real.recovery_median_s, rel=0.05)
    assert (said.losses, said.recoveries) == (1, 1)


def test_nothing_to_calibrate_from_is_said() -> None:
    with pytest.raises(ConfigError, match="nothing to calibrate from"):
        calibrated([[]])


def test_the_command_writes_a_profile_that_simulate_reads(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in record()))
    profile = tmp_path / "mine.json"
    assert main(["calibrate", str(folder), "--out", str(profile)]) == 0
    assert main(["calibrate", str(folder), "--out", str(tmp_path / "none" / "x.json")]) == 2
    argv = ["simulate", "--profile", str(profile), "--nodes", "4", "--hours", "0.02", "--layers",
            "1", "--mtbf", "1h", "--policies", "lazarus", "--json"]  # fmt: skip
    assert main(argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"][0]["step_s_at_start"] == pytest.approx(STEP_S, rel=0.01)
    assert answer["assumptions"][0]["source"] == "measured"


def test_claims_are_medians_over_seeds_and_say_why_they_fall_short() -> None:
    scenario = SCENARIOS["failure-5min"]
    (setting,) = [s for s in scenario.build(Files()) if s.name == "gpt-s"]
    setting = replace(setting, placed_layers=2, faults=Periodic(every_s=300, until=5, pick="first"))
    rows = simulate(setting, policies=["lazarus", "ds"], seeds=[0, 1, 2])
    hard = replace(
        scenario,
        claims=(
            Claim(part="gpt-s", better="lazarus", worse="ds", published=1.01),
            Claim(part="gpt-s", better="lazarus", worse="ds", published=99.0, note="too much"),
        ),
    )
    easy, missed = check_claims(hard, rows)
    assert easy["reached"] and easy["why_short"] == ""
    assert not missed["reached"] and missed["why_short"] == "too much"


def test_a_claim_over_no_progress_at_all_is_null_in_json() -> None:
    scenario = SCENARIOS["failure-5min"]
    (setting,) = [s for s in scenario.build(Files()) if s.name == "gpt-s"]
    rows = simulate(replace(setting, placed_layers=2, horizon_s=60.0), policies=["lazarus", "ds"])
    stuck = [replace(r, goodput_tokens_per_s=0.0) if r.policy == "ds" else r for r in rows]
    (claim,) = check_claims(scenario, stuck)
    assert claim["ours"] is None and claim["reached"]
    json.dumps(claim, allow_nan=False)


def test_a_long_run_says_how_far_its_clock_is() -> None:
    said: list[str] = []
    progress = Progress(2, say=said.append, every_s=0.0)
    (setting,) = [s for s in SCENARIOS["failure-5min"].build(Files()) if s.name == "gpt-s"]
    setting = replace(setting, placed_layers=1, horizon_s=900.0)
    progress.begins("first", horizon_s=900.0)
    run_one(setting, FleetPolicy(name="lazarus"), seed=0, on_clock=progress.at)
    assert said[0].startswith("run 1/2, first: hour 0.") and said[-1].endswith(" of 0.2")
    progress.ended()
    assert said[-1] == "1/2 runs, last first"
    quiet = Progress(1, say=said.append)
    count = len(said)
    for moment in range(1000):
        quiet.at(float(moment))
    assert len(said) == count  # two seconds have not passed


def test_scenarios_are_found_by_name_and_the_trace_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="failure-5min"):
        scenario_named("nothing")
    with pytest.raises(ConfigError, match="--trace"):
        scenario_named("spot-80min").build(Files())


def test_the_busiest_window_of_a_trace_is_found() -> None:
    lines = ["0,add,a", "0,add,b", "0,add,c", "1000000,remove,a", "9000000,remove,b",
             "9001000,remove,c"]  # fmt: skip
    assert busiest_window(parse_trace(lines, name="x").events, 100) == 8999.0


def test_the_tables_hold_published_and_own_figures(capsys: Any) -> None:
    rows = TABLES["multi-node"](Files())
    assert len(rows) == 4
    for row in rows:
        assert row["survival"]["lazarus"] >= row["survival"]["spread"]
    ratios = [row["ds_step_s"] / row["lazarus_step_s"] for row in TABLES["skew"](Files())]
    assert ratios == sorted(ratios)
    stalls = [row["stall_partial_s"] for row in TABLES["pec"](Files())]
    assert stalls == sorted(stalls, reverse=True)
    assert main(["simulate", "skew", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4


def test_fault_sources_are_seeded_and_bounded() -> None:
    source = Poisson(node_mtbf_s=100.0, replace_s=5.0, zones=2, zone_mtbf_s=500.0)
    events = source.events(num_nodes=6, horizon_s=300.0, seed=4)
    assert events == source.events(num_nodes=6, horizon_s=300.0, seed=4)
    assert events == sorted(events, key=lambda e: e.at_s) and events[-1].at_s < 300
    live: set[str] = {f"n{i}" for i in range(6)}
    for event in events:
        if event.kind == "add":
            assert not live & set(event.nodes)
            live |= set(event.nodes)
        else:
            assert set(event.nodes) <= live
            live -= set(event.nodes)
    assert Scripted(script=()).events(num_nodes=1, horizon_s=1, seed=0) == []
    with pytest.raises(ConfigError):
        Poisson(node_mtbf_s=0.0).events(num_nodes=1, horizon_s=1, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no public traces beside this checkout")
def test_the_published_ratios_are_reached_on_the_papers_own_traces() -> None:
    files = Files(
        expert_load=DATA / "expert-load" / "smartmoe-expert-load.npz",
        spot_trace=DATA / "spot-traces" / "bamboo-p3-trace.csv",
    )
    for name in ("failure-5min", "spot-80min"):
        scenario = SCENARIOS[name]
        settings = [s for s in scenario.build(files) if s.name == "gpt-l"]
        assert isinstance(settings[0].faults, Periodic | FromTrace)
        rows = [r for s in settings for r in simulate(s, policies=["lazarus", "ds", "ds-ft"])]
        claims = [c for c in check_claims(scenario, rows) if c["part"] == "gpt-l"]
        assert len(claims) == 2 and all(claim["reached"] for claim in claims), claims


@pytest.mark.slow
def test_the_published_ratios_at_512_and_1024_gpus_are_reached() -> None:
    scenario = SCENARIOS["deepseek-v3"]
    rows = [
        row
        for setting in scenario.build(Files())
        for row in simulate(
            setting, policies=["lazarus", "ds", "ds-ft"], seeds=range(scenario.seeds)
        )
    ]
    claims = check_claims(scenario, rows)
    assert len(claims) == 6 and all(claim["reached"] for claim in claims), claims
    assert all(low <= claim["ours"] <= high for claim in claims for low, high in [claim["range"]])

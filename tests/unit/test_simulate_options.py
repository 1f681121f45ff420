"""Profiles, shapes and options of the simulator: what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazarus.cli import main
from lazarus.errors import ConfigError
from lazarus.record.loads import (
    save_loads,
    uniform_load,
)
from lazarus.simulate.inputs.costs import PROFILES, grouped_step, read_profile, replicated_step
from lazarus.simulate.inputs.shapes import SHAPES
from lazarus.simulate.systems.policies import PAPER_COSTS
from placement import PlacementRequest, plan


def test_profiles_come_from_names_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(PROFILES["rtx3090-100g"].to_json())
    assert read_profile(str(path)) == PROFILES["rtx3090-100g"]
    path.write_text('{"schema": 1, "flops_per_s": -3.0}')
    with pytest.raises(ConfigError, match="flops_per_s"):
        read_profile(str(path))
    with pytest.raises(ConfigError, match="known names"):
        read_profile("nothing")


def test_every_figure_of_a_cost_model_has_a_unit_and_a_reason() -> None:
    for item in PROFILES["h200-8x400g"].assumptions():
        assert set(item) == {"name", "value", "unit", "why"} and item["why"]


def test_shapes_have_the_published_sizes() -> None:
    for name, total in (("gpt-s", 521e6), ("gpt-l", 1.7e9), ("mixtral-8x7b", 46.7e9),
                        ("olmoe-1b-7b", 6.9e9), ("deepseek-v3", 671e9)):  # fmt: skip
        assert SHAPES[name].total_params == pytest.approx(total, rel=0.03)


def test_a_skewed_load_slows_fixed_experts_and_hardly_the_replicated() -> None:
    """The paper's ablation: one expert gets up to four times its fair share."""
    costs, shape = PROFILES["rtx3090-100g"], SHAPES["gpt-s"]
    slow, ours = [], []
    for ratio in (1, 4):
        load = np.ones((1, 8))
        load[0, 0] = ratio * 7 / (8 - ratio)
        load /= load.sum()
        request = PlacementRequest(load=load, num_nodes=10, slots_per_node=6)
        made = plan(request)
        ours.append(replicated_step(costs, shape, made, load, tokens=40960).total)
        slow.append(grouped_step(costs, shape, load, nodes=10, group=2, tokens=40960).total)
    assert ours[1] < 1.1 * ours[0]
    assert slow[1] > 1.2 * slow[0]


def test_the_command_prints_rows_and_assumptions(capsys: Any) -> None:
    base = ["simulate", "--nodes", "6", "--hours", "0.5", "--mtbf", "1h", "--layers", "2"]
    assert main([*base, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1 and len(answer["rows"]) == 3
    assert {"flops_per_s", "detect_s"} <= {f["name"] for f in answer["assumptions"][0]["figures"]}
    assert main([*base, "--slots", "6", "8"]) == 0
    assert "cost model h200-8x400g (assumed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["nobody-knows"],
        ["--shape", "gpt-9"],
        ["--profile", "nothing"],
        ["--mtbf", "soon"],
        ["--mtbf", "1h", "--period", "5min"],
        ["--policies", "nobody"],
        ["--nodes", "0"],
        ["--load", "missing.npz"],
        ["--trace", "missing.csv"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(wrong: list[str], capsys: Any) -> None:
    assert main(["simulate", *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_every_assumption_stands_beside_the_rows(capsys: Any) -> None:
    base = ["simulate", "--nodes", "6", "--hours", "0.2", "--mtbf", "1h", "--layers", "1",
            "--group", "3", "--policies", "lazarus-slow,peer-memory"]  # fmt: skip
    assert main([*base, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {row["profile"] for row in answer["rows"]} == {"h200-8x400g"}
    (model,) = answer["assumptions"]
    (used,) = model["settings"]
    assert (used["group"], used["load"]["name"], used["join_debounce_s"]) == (3, "zipf:0.5", 2.0)
    assert used["checkpoint_every"] == used["ft_checkpoint_every"] == 250
    assert used["full_checkpoint_every"] == 50 and used["faults"]["node_mtbf_s"] == 3600
    assert used["policies"]["lazarus-slow"]["costs"] == PAPER_COSTS
    assert used["policies"]["peer-memory"]["spares"] == 1
    assert main(base) == 0
    said = capsys.readouterr().out
    assert "load zipf:0.5, group of 3, checkpoints every 250 steps" in said
    assert "lazarus-slow: detect_s 15, " in said


def test_uniform_loads_are_uniform() -> None:
    assert np.allclose(uniform_load(2, 4).at(0), 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--slots 0", "--slots 0 must be"),
        ("--slots 6 -1", "--slots -1 must be"),
        ("--slots 1 --nodes 2", "2 nodes x 1 slots = 2 < 8 experts of gpt-s; use --slots 4"),
        ("--min-replicas 0", "--min-replicas 0 must be"),
        ("--layers 0", "--layers 0 must be"),
        ("--group 0", "--group 0 must be"),
        ("--seeds 0", "--seeds 0 must be"),
        ("--hours nan", "--hours nan must be"),
        ("--hours inf", "--hours inf must be"),
        ("--tokens-per-node nan", "--tokens-per-node nan must be"),
        ("--zones -1 --zone-mtbf 1d", "--zones -1 must be"),
        ("--zone-mtbf 1d", "--zone-mtbf 1d does nothing without --zones"),
        ("--zones 4", "--zones 4 does nothing without --zone-mtbf"),
        ("--zones 4 --zone-mtbf 1d --period 5min", "--zones 4 does nothing with --period"),
        ("--slots 7 8 --memory 5", "--slots 7 8: at most 5 make sense with --memory 5 GB"),
    ],
)
def test_what_no_fleet_can_have_is_refused_with_its_value(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--shape", "gpt-s", *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("failure-5min --profile h200-8x400g", "--profile"),
        ("failure-5min --nodes 16", "--nodes"),
        ("failure-40min --min-replicas 2", "--min-replicas"),
        ("deepseek-v3 --mtbf 12h", "--mtbf"),
        ("deepseek-v3 --trace examples/spot.csv", "--trace"),
        ("failure-5min --load zipf:0.5", "--load zipf:0.5"),
        ("spot-80min --hours 24", "--hours"),
        ("skew --seeds 2", "--seeds"),
        ("pec --policies lazarus", "--policies"),
        ("multi-node --plot x.html", "--plot"),
        ("skew --load x.npz", "--load"),
    ],
)
def test_options_that_a_scenario_does_not_honour_are_refused(
    options: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named} means nothing to {options.split()[0]}")


def test_a_scenario_honours_policies_seeds_recovery_price_and_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = save_loads(tmp_path / "load.npz", np.ones((2, 2, 16)))
    options = ["--load", str(load), "--policies", "ds", "--seeds", "1", "--price", "3", "--json"]
    assert main(["simulate", "failure-5min", *options]) == 0
    assert {row["policy"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"ds"}
    assert main(["simulate", "multi-node", "--load", str(load), "--json"]) == 0

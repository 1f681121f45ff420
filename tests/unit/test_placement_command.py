"""The command ``lazarus plan``: what it prints, what it refuses, what it certifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazarus.cli import main

KEYS = {
    "schema", "replicas", "experts_of_node", "shares", "survival", "max_over_mean",
    "min_distinct_nodes", "method", "wall_ms",
}  # fmt: skip
SMALL = ["plan", "--load", "zipf:1.2", "--experts", "8", "--nodes", "5", "--slots", "4"]


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main([*SMALL, *options, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_json_has_the_promised_keys_and_says_the_same_everywhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, "--layers", "3")
    assert set(found) == KEYS and found["schema"] == 1
    replicas = np.array(found["replicas"])
    assert replicas.shape == (3, 8) and replicas.min() == found["min_distinct_nodes"] >= 2
    for layer, nodes in enumerate(found["experts_of_node"]):
        assert len(nodes) == 5 and all(len(set(n)) == len(n) <= 4 for n in nodes)
        counts = np.bincount([e for n in nodes for e in n], minlength=8)
        assert counts.tolist() == replicas[layer].tolist()
    shares = np.array(found["shares"])
    assert shares.shape == (3, 8, 5) and np.allclose(shares.sum(2), 1)
    assert set(found["survival"]) == {"1", "2", "3", "4", "5"}
    assert found["survival"]["1"] == 1.0 and found["survival"]["5"] == 0.0
    assert found["max_over_mean"] >= 1.0 and found["wall_ms"] > 0


def test_the_table_shows_the_heat_map_the_certificate_and_every_baseline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(SMALL) == 0
    out, err = capsys.readouterr()
    for word in ("node 4", "e7", "survives losses of", "fatal set", "max/mean", "this plan",
                 "mro", "spread", "compact", "eplb-like"):  # fmt: skip
        assert word in out
    assert "\033[" not in out and err == ""


def test_the_heat_map_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([1.0] * 50))
    assert main(["plan", "--load", str(tmp_path / "a.json"), "--nodes", "4", "--slots", "26"]) == 0
    out, _ = capsys.readouterr()
    assert "4 of 4 nodes, 48 of 50 experts" in out and "layer 0" not in out


def test_loads_come_from_json_npy_and_npz(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = np.arange(1, 13, dtype=float).reshape(2, 6)
    (tmp_path / "a.json").write_text(json.dumps(load.tolist()))
    np.save(tmp_path / "a.npy", load)
    np.savez(tmp_path / "a.npz", load=np.stack([load, load]), iters=[1, 2])
    answers = []
    for name in ("a.json", "a.npy", "a.npz"):
        assert main(["plan", "--load", str(tmp_path / name), "--nodes", "4", "--slots", "4",
                     "--json"]) == 0  # fmt: skip
        found = json.loads(capsys.readouterr().out)
        found.pop("wall_ms")
        answers.append(found)
    assert answers[0] == answers[1] == answers[2]
    (tmp_path / "one.json").write_text("[1, 2, 3]")
    assert main(["plan", "--load", str(tmp_path / "one.json"), "--layers", "4", "--nodes", "3",
                 "--slots", "3", "--json"]) == 0  # fmt: skip
    assert len(json.loads(capsys.readouterr().out)["replicas"]) == 4


def test_a_lowered_floor_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--load", "uniform", "--experts", "16", "--nodes", "5", "--slots", "6",
                 "--json"]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert json.loads(out)["min_distinct_nodes"] == 1
    assert "floor lowered from 2 to 1" in err


BAD = [
    (["--load", "uniform", "--nodes", "3", "--slots", "3"], "needs --experts"),
    (["--load", "uniform", "--experts", "16", "--nodes", "2", "--slots", "6"], "12 < 16"),
    (["--load", "uniform", "--experts", "4", "--nodes", "2", "--slots", "0"], "--slots=0"),
    (["--load", "uniform", "--experts", "4", "--nodes", "-2", "--slots", "4"], "--nodes=-2"),
    (["--load", "uniform", "--experts", "0", "--nodes", "2", "--slots", "4"], "--experts=0"),
    (["--load", "uniform", "--experts", "4", "--nodes", "2", "--slots", "4",
      "--min-replicas", "3"], "there are 2"),
    (["--load", "uniform", "--experts", "4", "--nodes", "2", "--slots", "4",
      "--min-replicas", "0"], "--min-replicas=0"),
    (["--load", "zipf:hot", "--experts", "4", "--nodes", "2", "--slots", "4"], "zipf:1.2"),
    (["--load", "zipf:-1", "--experts", "4", "--nodes", "2", "--slots", "4"], "S=-1"),
    (["--load", "nowhere.json", "--nodes", "2", "--slots", "4"], "no such file"),
    (["--nodes", "2", "--slots", "4"], "--load missing"),
    (["--load", "uniform", "--experts", "999999999", "--nodes", "99999", "--slots", "99999"],
     "is more than"),
    (["--certify", "nowhere.json"], "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


FILES = [
    ("a.json", "{]", "not JSON"),
    ("a.json", '{"a": 1}', "JSON dict"),
    ("a.json", "[[1, -2]]", "-2.0"),
    ("a.json", "[[1, NaN]]", "NaN is no number"),
    ("a.json", "[[1, 2], [3]]", "unequal"),
    ("a.json", '[["x"]]', "not an array of numbers"),
    ("a.json", "[]", "shape"),
    ("a.json", "[" * 100_000, "not JSON"),
    ("a.npy", "not numpy", "no .npy of numbers"),
    ("a.npz", "not numpy", "no .npz of numbers"),
]


@pytest.mark.parametrize(("name", "text", "message"), FILES)
def test_a_broken_load_file_is_refused(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["plan", "--load", str(tmp_path / name), "--nodes", "2", "--slots", "4"]) == 2
    assert message in capsys.readouterr().err


def test_a_pickled_load_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert main(["plan", "--load", str(tmp_path / "a.npy"), "--nodes", "2", "--slots", "4"]) == 2
    assert "no .npy of numbers" in capsys.readouterr().err


def test_our_own_plan_is_certified_as_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(capsys, "--layers", "2")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    load = ["--load", "zipf:1.2", "--experts", "8", "--layers", "2"]
    assert main(["plan", "--certify", str(path), *load, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for key in KEYS - {"method", "wall_ms", "shares", "max_over_mean"}:
        assert again[key] == found[key]
    assert np.allclose(again["shares"], found["shares"])
    assert again["max_over_mean"] == pytest.approx(found["max_over_mean"])
    assert main(["plan", "--certify", str(path)]) == 0
    assert "survives losses of" in capsys.readouterr().out


def test_somebody_elses_plan_needs_no_more_than_its_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"experts_of_node": [[[0, 1], [0, 2], [1, 2]]]}))
    assert main(["plan", "--certify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == KEYS
    assert found["survival"] == {"1": 1.0, "2": 0.0, "3": 0.0}
    assert found["min_distinct_nodes"] == 2


def test_a_plan_that_claims_too_much_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    claim = {"experts_of_node": [[[0, 1], [0, 1], [2, 0]]], "survival": {"1": 1.0},
             "min_distinct_nodes": 2, "replicas": [[3, 2, 2]]}  # fmt: skip
    path.write_text(json.dumps(claim))
    assert main(["plan", "--certify", str(path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["survival"]["1"] == pytest.approx(2 / 3)
    assert err.count("bad: ") == 3 and "0.666667, not 1.0" in err
    worse = {"experts_of_node": [[[0], [0]]], "survival": {"3": 0.0}, "max_over_mean": 0.5}
    path.write_text(json.dumps(worse))
    assert main(["plan", "--certify", str(path)]) == 1
    err = capsys.readouterr().err
    assert "3 losses: there are 2 nodes" in err and "never below 1, not 0.5" in err


def test_auto_solves_a_small_problem_exactly_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["plan", "--load", "zipf:1", "--experts", "4", "--nodes", "4", "--slots", "3", "--json"]
    found = {}
    for solver in ("auto", "greedy", "ilp"):
        assert main([*small, "--solver", solver]) == 0
        out, err = capsys.readouterr()
        found[solver] = json.loads(out)
        assert ("ilp" in found[solver]["method"] + err) == (solver != "greedy")
    assert found["auto"]["survival"] == found["ilp"]["survival"]
    assert found["auto"]["survival"]["2"] == 1.0 > found["greedy"]["survival"]["2"]
    assert found["auto"]["max_over_mean"] <= found["greedy"]["max_over_mean"] + 1e-3
    assert main(["plan", "--load", "uniform", "--experts", "16", "--nodes", "10", "--slots", "6",
                 "--json"]) == 0  # fmt: skip
    assert "ilp" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "experts_of_node"),
        ({"experts_of_node": 3}, "experts_of_node"),
        ({"experts_of_node": [[[0]], [[0], [0]]]}, "different numbers of nodes"),
        ({"experts_of_node": [[["a"]]]}, "experts_of_node"),
        ({"experts_of_node": [[[0, 5]]], "replicas": [[1, 1]]}, "expert 5; there are 2"),
        ({"experts_of_node": [[[0, 2]]]}, "layer 0, expert 1 is on no node"),
        ({"experts_of_node": [[[0], [0]]], "shares": [[[0.5, 0.2]]]}, "add up to 0.7"),
        ({"experts_of_node": [[[0], []]], "shares": [[[0.5, 0.5]]]}, "does not hold"),
        ([1, 2], "JSON list"),
        ({"experts_of_node": [[[0]]], "schema": 9}, "schema 9; this certifies schema 1"),
        ({"experts_of_node": [[[10**12]]]}, "at most 1000000"),
        ({"experts_of_node": [[[0]]], "survival": [1.0]}, "wanted an object"),
        ({"experts_of_node": [[[0]]], "survival": {"1": "yes"}}, "'1' lost nodes is 'yes'"),
        ({"experts_of_node": [[[0]]], "survival": {"one": 1.0}}, "'one' lost nodes is 1.0"),
    ],
)
def test_what_is_no_plan_is_not_certified(
    data: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert main(["plan", "--certify", str(path)]) == 2
    assert message in capsys.readouterr().err

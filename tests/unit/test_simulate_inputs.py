"""Trace files, loads, profiles and the command: what is wrong is said with its place."""

from __future__ import annotations

import base64
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.cli import main
from lazarus.errors import ConfigError
from lazarus.record.loads import (
    counts_of_run,
    fitted,
    journals_of,
    load_loads,
    save_loads,
    zipf_load,
)
from lazarus.run.result import leave_artifacts
from lazarus.simulate.inputs.traces import parse_trace, read_trace, segment

SPOT = Path(__file__).resolve().parents[3] / "shared" / "data" / "spot-traces"


def test_both_forms_of_a_trace_say_the_same() -> None:
    csv = parse_trace(["0,add,a", "0,add,b", "5000,remove,a"], name="x.csv")
    rows = ['[0,"add",{"nodes":["a","b"]}]', '[1,"no-op",{"nodes":[]}]',
            '[5000,"remove",{"nodes":["a"]}]']  # fmt: skip
    assert parse_trace(rows, name="x.csv") == csv
    assert csv.nodes_at(10) == {"b"} and csv.length_s == 5.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("garbage", "is not ms,add|remove,node"),
        ("12,explode,a", "is not ms,add|remove,node"),
        ("x,add,a", "not a time"),
        ("-5,add,a", "not a time"),
        ("nan,add,a", "not a time"),
        ("[1,2", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('[1,"add",{"nodes":"a"}]', "is not"),
        ('[1,"add",{"nodes":[3]}]', "nodes must be names"),
        ("[" + "9" * 400 + ',"add",{"nodes":["a"]}]', "not a time"),
        ("[" + "9" * 5000 + ',"add",{"nodes":["a"]}]', "4300 digits"),
        ("9" * 5000 + ",add,a", "not a time"),
        ("500,add,c", "time goes backwards: 500 ms after 1000 ms"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        parse_trace(["1000,add,a", "", line], name="fleet.csv")
    assert "fleet.csv:3: " in str(problem.value) and said in str(problem.value)


def test_unknown_removals_and_repeated_adds_are_counted_and_mean_nothing() -> None:
    trace = parse_trace(["0,add,a", "1,remove,zz", "2,add,a", "3,remove,a"], name="x")
    assert (trace.unknown_removals, trace.repeated_adds) == (1, 1)
    assert [e.kind for e in trace.events] == ["add", "remove"]


def test_time_starts_when_the_first_node_is_added() -> None:
    wanted = parse_trace(["0,add,a", "0,add,b", "5000,remove,a"], name="x")
    epoch = 1_700_000_000_000
    lines = [f"{epoch},add,a", f"{epoch},add,b", f"{epoch + 5000},remove,a"]
    assert parse_trace(lines, name="x") == wanted
    rows = ['[0,"no-op",{"nodes":[]}]', '[900,"remove",{"nodes":["z"]}]',
            '[1000,"add",{"nodes":["a","b"]}]', '[6000,"remove",{"nodes":["a"]}]']  # fmt: skip
    late = parse_trace(rows, name="x")
    assert (late.events, late.unknown_removals) == (wanted.events, 1)
    with pytest.raises(ConfigError, match="x: adds no node"):
        parse_trace(["0,remove,a"], name="x")


def test_a_trace_by_the_clock_of_the_day_is_simulated(tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "epoch.csv"
    lines = [f"1700000000000,add,n{name}" for name in ("1", "\u00b2", "9" * 5000)]
    trace.write_text("\n".join([*lines, "1700000600000,remove,n1"]))
    argv = ["simulate", "--trace", str(trace), "--slots", "16", "--hours", "0.5", "--layers", "1",
            "--policies", "lazarus", "--json"]  # fmt: skip
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["num_nodes"], row["losses"]) == (3, 1) and row["steps"] > 0


def test_an_empty_trace_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no event"):
        parse_trace([], name="x")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nothing.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "binary")


@given(st.lists(st.text(max_size=30), max_size=20))
def test_no_text_does_anything_but_parse_or_raise_a_config_error(lines: list[str]) -> None:
    try:
        trace = parse_trace(lines, name="fuzz")
    except ConfigError:
        return
    assert trace.events


def test_a_segment_never_has_more_nodes_than_its_cap() -> None:
    lines = [f"0,add,n{i}" for i in range(9)] + ["1000,remove,n0", "2000,remove,n1", "3000,add,x"]
    part = segment(parse_trace(lines, name="x"), start_s=0.5, length_s=10, most_nodes=4)
    for at_s in (0.0, 0.6, 1.6, 2.6):
        assert len(part.nodes_at(at_s)) == 4


@pytest.mark.skipif(not SPOT.is_dir(), reason="no public spot traces beside this checkout")
def test_the_public_traces_are_read() -> None:
    bamboo = read_trace(SPOT / "bamboo-p3-trace.csv")
    assert sum(len(e.nodes) for e in bamboo.events if e.kind == "remove") == 167
    assert read_trace(SPOT / "parcae-hl_15_25.txt", time_scale=0.5).length_s <= 1800
    for name in ("bamboo-p3-trace.csv", "parcae-hl_15_25.txt"):
        trace = read_trace(SPOT / name)
        first = (SPOT / name).read_text().splitlines()[0].lstrip("[").split(",")[0]
        assert float(first) == trace.events[0].at_s == 0.0


def test_loads_are_written_and_read_back(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 100, (7, 2, 4))
    trace = load_loads(save_loads(tmp_path / "expert_load.npz", counts, steps=range(3, 10)))
    assert np.array_equal(trace.counts, counts) and trace.steps[0] == 3
    assert np.allclose(trace.at(4), counts[1] / counts[1].sum(1, keepdims=True))
    with pytest.raises(ValueError, match="wanted"):
        save_loads(tmp_path / "x.npz", counts[0])


def damaged_loads(folder: Path) -> list[Path]:
    """Files that hold no load: cut short, altered, or something else."""
    whole = save_loads(folder / "whole.npz", np.arange(4000).reshape(500, 2, 4)).read_bytes()
    np.save(folder / "whole.npy", np.ones((3, 2, 4)))
    at = len(whole) // 2
    content = {
        "nonsense.npz": b"nonsense",
        "empty.npz": b"",
        "short.npz": whole[:at],
        "altered.npz": whole[:at] + bytes(64) + whole[at + 64 :],
        "short.npy": (folder / "whole.npy").read_bytes()[:-9],
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content]


def test_a_damaged_load_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    np.savez(tmp_path / "c.npz", load=-np.ones((2, 2, 2)))
    np.savez(tmp_path / "d.npz", load=np.float64(3))
    np.savez(tmp_path / "e.npz", load=np.ones((2, 2, 2)), steps=np.int64(2))
    others = [tmp_path / f"{name}.npz" for name in ("b", "c", "d", "e", "missing")]
    for path in [*damaged_loads(tmp_path), *others]:
        with pytest.raises(ConfigError, match=path.name):
            load_loads(path)
        assert main(["simulate", "--load", str(path), "--nodes", "4", "--hours", "0.1"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and path.name in said


def test_plan_names_a_damaged_load_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in damaged_loads(tmp_path):
        assert main(["plan", "--load", str(path), "--nodes", "4", "--slots", "4"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and path.name in said


def test_a_npy_is_a_load_over_time_or_for_all_time(tmp_path: Path) -> None:
    share_LE = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    np.save(tmp_path / "x.npy", share_LE)
    np.save(tmp_path / "y.npy", np.stack([share_LE * 80, share_LE[::-1] * 80]))
    assert np.allclose(load_loads(tmp_path / "x.npy").at(7), share_LE)
    assert np.allclose(load_loads(tmp_path / "y.npy").at(2), share_LE[::-1])
    np.save(tmp_path / "z.npy", np.ones(3))
    with pytest.raises(ConfigError, match="wanted"):
        load_loads(tmp_path / "z.npy")
    assert main(["simulate", "--load", str(tmp_path / "x.npy"), "--nodes", "8", "--hours", "0.1",
                 "--shape", "gpt-s", "--json"]) == 0  # fmt: skip


def test_rows_are_printed_before_a_plot_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["simulate", "--nodes", "8", "--hours", "0.1", "--shape", "gpt-s"]
    plot = str(tmp_path / "none" / "x.html")
    assert main([*few, "--json", "--plot", plot]) == 2
    said = capsys.readouterr()
    assert len(json.loads(said.out)["rows"]) == 3
    assert said.err.startswith("error: ") and "none/x" in said.err and said.err.count("\n") == 1
    assert main([*few, "--plot", plot]) == 2
    assert "lazarus" in capsys.readouterr().out


def test_loads_that_cannot_be_written_leave_what_was_there(tmp_path: Path) -> None:
    path = save_loads(tmp_path / "x.npz", np.ones((2, 1, 2)))
    more = np.random.default_rng(0).integers(0, 1 << 40, (200, 4, 8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as with a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            save_loads(path, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_loads(path).counts.sum() == 4
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def commit(step: int, value: float) -> dict[str, Any]:
    lanes = np.zeros(10 + 1 + 2 * 2)
    lanes[11:13] = value
    return {"step": step, "lanes": base64.b64encode(lanes.astype("<f8").tobytes()).decode()}


def life(*commits: tuple[int, float]) -> list[dict[str, Any]]:
    """The journal of one life of a run with one node, one layer and two experts."""
    made = [{"kind": "commits", "commits": [commit(step, value)]} for step, value in commits]
    return [{"kind": "resume", "shape": [1, 2], "seats": ["a"]}, *made]


def leave_journal(folder: Path, entries: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for number, entry in enumerate(entries, start=1):
        (folder / f"{number:09d}.json").write_text(json.dumps(entry))


def test_only_committed_steps_count_and_a_rollback_voids_what_came_after(tmp_path: Path) -> None:
    leave_journal(tmp_path / "journal", life((1, 1), (2, 2), (3, 3), (2, 9)))
    trace = counts_of_run(tmp_path)
    assert trace is not None
    assert trace.steps.tolist() == [1, 2]
    assert trace.counts[:, 0, 0].tolist() == [1, 9]


def test_all_lives_of_a_run_count_in_their_order(tmp_path: Path) -> None:
    for number in range(1, 12):  # each does its predecessor's last step again
        folder = tmp_path / ("journal" if number == 1 else f"journal-{number}")
        leave_journal(folder, life((number, number), (number + 1, number)))
    (tmp_path / "journal.txt").write_text("not a journal")
    assert journals_of(tmp_path)[-2:] == [tmp_path / "journal-10", tmp_path / "journal-11"]
    trace = counts_of_run(tmp_path)
    assert trace is not None
    assert trace.steps.tolist() == list(range(1, 13))
    assert trace.counts[:, 0, 0].tolist() == [*range(1, 12), 11]
    leave_artifacts(tmp_path)
    assert np.array_equal(load_loads(tmp_path / "expert_load.npz").counts, trace.counts)


def test_a_run_without_a_journal_has_no_loads(tmp_path: Path) -> None:
    assert counts_of_run(tmp_path) is None


def test_a_trace_of_another_shape_is_brought_to_this_one() -> None:
    trace = zipf_load(2, 32, 1.0)
    assert fitted(trace, num_layers=5, num_experts=8).counts.shape == (1, 5, 8)
    assert fitted(trace, num_layers=1, num_experts=64).counts.shape == (1, 1, 64)

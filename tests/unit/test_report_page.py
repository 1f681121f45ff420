"""The report: complete from a record alone, self-contained, and drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazarus.cli import main
from lazarus.control.plans import planning
from lazarus.errors import RecordError
from lazarus.record.loads import save_loads
from lazarus.report import compare_reports, write_report
from lazarus.report.series import thinned, view_of

MIB = 1_000_000
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def record(faults: int = 3, steps: int = 60) -> list[dict[str, Any]]:
    """A run of five nodes that loses ``faults`` of them and gets one back."""
    events: list[dict[str, Any]] = [
        {"t": 0.0, "event": "run_started", "generation": 1, "num_nodes": 5, "world_size": 5,
         "schema": 1, "num_layers": 2, "num_experts": 8},
        plan(1, [0, 1, 2, 3, 4], 0.0),
    ]  # fmt: skip
    now, nodes, generation = 0.0, [0, 1, 2, 3, 4], 1
    for step in range(1, steps + 1):
        now += 0.1
        events.append(
            {"t": now, "event": "step_committed", "generation": generation, "step": step,
             "loss": 5.0 / step, "tokens": 800, "num_nodes": len(nodes), "wall_s": 0.1}
        )  # fmt: skip
        if step % 15 == 0 and faults:
            faults -= 1
            generation += 1
            gone = nodes.pop()
            events += lost(gone, generation, now, nodes)
            now += 0.3
        if step % 20 == 0:
            events.append({"t": now, "event": "checkpoint_persisted", "generation": generation,
                           "step": step, "bytes": 1000, "wall_s": 0.1})  # fmt: skip
    return events


def plan(generation: int, nodes: list[int], t: float) -> dict[str, Any]:
    ranks = [[0, 1, 2, 3] if i % 2 else [4, 5, 6, 7] for i in range(len(nodes))]
    return {"t": t, "event": "plan_adopted", "generation": generation, "digest": "d",
            "nodes": nodes, "experts_of_rank": [ranks, ranks]}  # fmt: skip


def lost(node: int, generation: int, t: float, left: list[int]) -> list[dict[str, Any]]:
    return [
        {"t": t, "event": "fault_injected", "generation": generation - 1, "node": node,
         "kind": "kill", "step": 1},
        {"t": t + 0.02, "event": "node_lost", "generation": generation - 1, "node": node,
         "cause": "stream closed </script>"},
        plan(generation, list(left), t + 0.1),
        {"t": t + 0.3, "event": "reconfigured", "generation": generation, "reason": "node_lost",
         "wall_s": 0.3, "phases": {"detect": 0.02, "groups": 0.08, "redo": 0.2},
         "num_nodes": len(left), "moves": 3, "bytes_moved": 100, "lost": [node]},
    ]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run-a"
    folder.mkdir()
    lines = "".join(json.dumps(e) + "\n" for e in sorted(record(), key=lambda e: e["t"]))
    (folder / "events.jsonl").write_text(lines)
    save_loads(folder / "expert_load.npz", np.random.default_rng(0).integers(0, 99, (60, 2, 8)))
    return folder


def figures(page: Path) -> dict[str, Any]:
    text = page.read_text()
    data = re.search(r'id="figures">(.*?)</script>', text, re.S)
    assert data is not None
    return dict(json.loads(data[1]))


def test_a_run_becomes_one_file_below_six_megabytes_with_every_chart(run_dir: Path) -> None:
    page = write_report(run_dir)
    text = page.read_text()
    assert page.stat().st_size < 6 * MIB
    for title in ("Loss", "Throughput", "Live nodes", "Recoveries", "Placement at the start",
                  "Placement at the end", "Expert load, MoE layer 1", "Checkpoint age",
                  "Certificate", "ETTR", "PLT"):  # fmt: skip
        assert title in text
    drawn = figures(page)
    recoveries = next(f for f in drawn.values() if f["layout"].get("barmode") == "stack")
    assert len(recoveries["data"][0]["y"]) == 3
    assert len(drawn["chart-0"]["layout"]["shapes"]) == 3


def test_the_page_may_not_fetch_anything_and_text_of_the_record_cannot_break_out(
    run_dir: Path,
) -> None:
    text = write_report(run_dir).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!data:)', text.split("<script>")[0])
    assert "stream closed </script>" not in text


def test_a_record_with_nothing_in_it_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert write_report(tmp_path).exists()


def test_a_damaged_record_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"t":1,"event":"x","generation":0}\nnonsense\n')
    with pytest.raises(RecordError, match=r"events.jsonl:2"):
        write_report(tmp_path)


def test_a_damaged_load_file_costs_only_its_chart(run_dir: Path) -> None:
    loads = run_dir / "expert_load.npz"
    whole = loads.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:60] + bytes(64) + whole[124:], b""):
        loads.write_bytes(damaged)
        text = write_report(run_dir).read_text()
        assert "Throughput" in text and "Expert load" not in text


def test_live_nodes_fall_when_one_is_lost() -> None:
    view = view_of(sorted(record(faults=2), key=lambda e: e["t"]), name="a")
    assert [n for _, n in view.nodes][:3] == [5, 4, 3]
    assert len(view.phases) == 2


def test_long_runs_are_thinned_and_keep_their_last_step() -> None:
    kept = thinned(list(range(100_001)), most=1_000)
    assert len(kept) <= 1_001 and kept[0] == 0 and kept[-1] == 100_000


def test_runs_are_laid_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "run-b"
    shutil.copytree(run_dir, other)
    page = compare_reports([run_dir, other], out=tmp_path / "both.html")
    assert len(figures(page)["chart-1"]["data"]) == 2
    assert "run-b" in page.read_text()


def adopted(tmp_path: Path, *plans: dict[str, Any]) -> Path:
    """A record that adopts these plans, with a step in between."""
    events = sorted([*record(faults=0, steps=2)[:1], *plans], key=lambda e: e["t"])
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return tmp_path


def unlisted(t: float) -> dict[str, Any]:
    large = plan(2, list(range(30)), t)
    del large["experts_of_rank"]
    return large


def test_plans_too_large_for_the_record_are_named_on_the_page(tmp_path: Path) -> None:
    text = write_report(adopted(tmp_path, unlisted(0.0))).read_text()
    assert "Plans that are not drawn: 1, not in the record slot by slot (over 20,000 slots)" in text
    assert "Not made: the last plan is not in the record" in text
    assert "Placement at the start" not in text
    text = write_report(adopted(tmp_path, plan(1, [0, 1], 0.0), unlisted(1.0))).read_text()
    assert "Plans that are not drawn: 1," in text and "Placement at the start" in text
    assert "Not made: the last plan is not in the record" in text
    assert planning._MOST_LISTED == 20_000


def test_a_page_says_that_many_nodes_are_not_certified(tmp_path: Path) -> None:
    text = write_report(adopted(tmp_path, plan(1, list(range(65)), 0.0))).read_text()
    assert "Placement at the start" in text and "Not made: 65 nodes; above 64" in text
    text = write_report(adopted(tmp_path, plan(1, list(range(64)), 0.0))).read_text()
    assert "Not made" not in text


def test_two_runs_are_compared_by_the_command(
    run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "run-b"
    shutil.copytree(run_dir, other)
    with (other / "events.jsonl").open("a") as out:
        out.write(json.dumps({**record()[2], "t": 99.0, "step": 61, "loss": 0.5}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--compare", str(run_dir), str(other)]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    text = Path("comparison.html").read_text()
    assert "2 Lazarus runs" in text and "<td>run-a</td><td>60</td>" in text
    assert "<td>run-b</td><td>61</td>" in text
    assert main(["report", "--compare", str(run_dir), str(other), "--json", "--out", "c.html"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == "c.html"


def test_a_page_elsewhere_leaves_the_runs_folder_alone(run_dir: Path, tmp_path: Path) -> None:
    before = sorted(run_dir.iterdir())
    page = tmp_path / "pages" / "a.html"
    assert main(["report", str(run_dir), "--out", str(page)]) == 0
    assert "Throughput" in page.read_text() and sorted(run_dir.iterdir()) == before


def test_a_page_that_cannot_be_written_is_one_line(
    run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "x.html")
    (run_dir / "report.html").mkdir()  # in the way
    for arguments in (
        ["report", str(run_dir), "--out", out],
        ["report", "--compare", str(run_dir), "--out", out],
        ["report", str(run_dir)],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: /") and said.count("\n") == 1
    assert not list(run_dir.glob(".*.tmp"))


def test_the_command_writes_and_says_where(run_dir: Path, capsys: Any) -> None:
    assert main(["report", str(run_dir), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"].endswith("report.html") and answer["bytes"] < 6 * MIB
    assert main(["report"]) == 2


def screenshot(page: Path, out: Path, *, width: int, height: int) -> str:
    """Draw a page in a window of any width, inside a frame; the browser's log."""
    frame = out.with_suffix(".html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.as_uri()}" '
        f'style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--enable-logging=stderr", "--force-device-scale-factor=1", f"--user-data-dir={out}.d",
         f"--window-size={max(width, 600)},{height}", "--virtual-time-budget=8000",
         f"--screenshot={out}", frame.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return done.stderr


def pixels(path: Path) -> np.ndarray:
    """uint8 [height, width, channels] of an 8-bit PNG without interlacing."""
    data = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[colour]
    chunks, at = b"", 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        chunks += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    raw, stride = zlib.decompress(chunks), width * channels
    rows, above = [], bytes(stride)
    for y in range(height):
        first = y * (stride + 1)
        line = raw[first + 1 : first + 1 + stride]
        above = unfiltered(raw[first], line, above, channels)
        rows.append(above)
    return np.frombuffer(b"".join(rows), np.uint8).reshape(height, width, channels)


def unfiltered(kind: int, line: bytes, above: bytes, channels: int) -> bytes:
    if kind == 0:
        return line
    if kind == 2:
        return (np.frombuffer(line, np.uint8) + np.frombuffer(above, np.uint8)).tobytes()
    out = bytearray(len(line))
    for x, value in enumerate(line):
        left = out[x - channels] if x >= channels else 0
        up, corner = above[x], above[x - channels] if x >= channels else 0
        if kind == 1:
            guess = left
        elif kind == 3:
            guess = (left + up) // 2
        else:
            a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = left if a <= b and a <= c else up if b <= c else corner
        out[x] = (value + guess) & 255
    return bytes(out)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_the_charts_without_errors(
    run_dir: Path, tmp_path: Path, width: int
) -> None:
    page = write_report(run_dir)
    height = 2600 if width == 1280 else 4400
    log = screenshot(page, tmp_path / "shot.png", width=width, height=height)
    assert not re.findall(r"CONSOLE.*?(?:Error|Refused|Uncaught).*", log)
    seen = pixels(tmp_path / "shot.png")[:, :width, :3].astype(int)
    blue = (abs(seen - np.array([0x00, 0x72, 0xB2])).max(2) < 12).any(1)
    red = (abs(seen - np.array([0xD6, 0x27, 0x28])).max(2) < 12).any(1)
    assert blue[: height // 3].sum() > 30, "the loss curve is drawn"
    assert red[: height // 3].sum() > 30, "the faults are marked"
    assert blue[height // 3 :].sum() > 100, "recoveries and placement are drawn"
    ink = (seen.min(2) < 235).any(1)
    assert ink[: height // 2].mean() > 0.5, "text and charts fill the page"

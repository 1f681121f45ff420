"""What the records of goodput_under_faults.py say: figures of one run, medians, the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from goodput_plans import Plan
from goodput_shapes import of_testbed, proportions

from lazarus.record.events import Event, read_events
from lazarus.record.metrics import committed_steps, plt

LAZARUS = "Lazarus"


def figures(folder: Path, began: float, plan: Plan) -> dict[str, Any]:
    """What the record of one of our systems says of the measured window."""
    events = [e for e in read_events(folder) if e["t"] <= began + plan.wall_s]
    counted = committed_steps(events)
    inside = [e for e in counted.values() if e["t"] > began]
    made = sum(e["event"] == "step_committed" for e in events)
    waits = _waits(folder, began, plan)
    stalls = _stalls(events, waits)
    last = max(counted, default=0)
    restored = [e for e in events if e["event"] == "expert_restored"]
    moved = sum(int(e["bytes_moved"]) for e in events if e["event"] == "reconfigured")
    return {
        "goodput_tokens_per_s": sum(int(e["tokens"]) for e in inside) / plan.wall_s,
        "ettr": min(1.0, sum(float(e["wall_s"]) for e in inside) / plan.wall_s),
        "step_s": statistics.median(float(e["wall_s"]) for e in inside) if inside else 0.0,
        "steps": last,
        "steps_lost": made - len(counted),
        "experts_restored": len(restored),
        "lost_copies": sum(float(e["lost_copies"]) for e in restored),
        "plt": plt(events),
        "loss": counted[last]["loss"] if counted else None,  # at equal wall time
        "bytes_moved": moved,
        "save_s": _median([w["save_s"] for w in waits if "save_s" in w]),
        "restart_s": _median(restarts(_lives(events))),
        "stall_s_by_phase": {k: round(v, 3) for k, v in stalls.items()},
    }


def _waits(folder: Path, began: float, plan: Plan) -> list[dict[str, float]]:
    """What training waited for storage, as rank 0 noted it."""
    path = waits_of(folder)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [w for line in lines if began < (w := json.loads(line))["t"] <= began + plan.wall_s]


def waits_of(folder: Path) -> Path:
    """Where a run of ours notes what it waited for storage."""
    return folder.with_suffix(".waits")


def _stalls(events: Sequence[Event], waits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds without progress by phase: of reconfigurations, of storage, of whole restarts."""
    found: dict[str, float] = {}
    trains = False  # this life has; what comes before is part of its start
    for event in events:
        kind = event["event"]
        trains = kind != "run_started" and (trains or kind == "step_committed")
        for name, seconds in event["phases"].items() if trains and kind == "reconfigured" else ():
            found[name] = found.get(name, 0.0) + float(seconds)
    for wait in waits:
        for name in ("save", "read"):
            if f"{name}_s" in wait:
                found[name] = found.get(name, 0.0) + wait[f"{name}_s"]
    if again := restarts(_lives(events)):
        found["restart"] = sum(again)
    return found


def _lives(events: Sequence[Event]) -> list[list[float]]:
    """Moments of the commits, life by life."""
    found: list[list[float]] = []
    for event in events:
        if event["event"] == "run_started":
            found.append([])
        elif event["event"] == "step_committed" and found:
            found[-1].append(float(event["t"]))
    return found


def restarts(lives: Sequence[Sequence[float]]) -> list[float]:
    """Seconds from the last commit of a life to the first of the next; none that never came."""
    with_commits = [moments for moments in lives if moments]
    return [later[0] - earlier[-1] for earlier, later in pairwise(with_commits)]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def peer_figures(
    lines: Sequence[Mapping[str, Any]], *, began: float, wall_s: float, kills: int
) -> dict[str, Any]:
    """What the log says of the measured window; steps above a resumed one were rolled back."""
    counted: dict[tuple[int, int], Mapping[str, Any]] = {}
    made, lives, saves = 0, [[]], []  # type: int, list[list[float]], list[float]
    for line in (x for x in lines if x["t"] <= began + wall_s):
        if "resumed" in line:
            counted = {key: x for key, x in counted.items() if key[0] <= line["resumed"]}
            lives.append([])
        elif "save_s" in line:
            saves.append(float(line["save_s"]))
        else:
            counted[line["step"], line.get("part", 0)] = line
            lives[-1].append(float(line["t"]))
            made += 1
    inside = [x for x in counted.values() if x["t"] > began]
    # The median stands for all: part of a step in which a system waits for a loss is no progress.
    step_s = _median([float(x["wall_s"]) for x in inside])
    last = max((x["step"] for x in counted.values()), default=0)
    final = [float(x["loss"]) for x in counted.values() if x["step"] == last]
    again = restarts(lives)
    stalls = {"save": sum(saves), "restart": sum(again)}
    return {
        "goodput_tokens_per_s": sum(int(x["tokens"]) for x in inside) / wall_s,
        "ettr": min(1.0, len({x["step"] for x in inside}) * step_s / wall_s),
        "step_s": step_s,
        "steps": last,
        "steps_lost": made - len(counted),
        "kills": kills,
        "experts_restored": 0,
        "lost_copies": 0.0,
        "plt": 0.0,
        "loss": sum(final) / len(final) if final else float("nan"),
        "bytes_moved": 0,
        "save_s": _median(saves),
        "restart_s": _median(again),
        "stall_s_by_phase": {k: round(v, 3) for k, v in stalls.items() if v},
    }


def line(row: Mapping[str, Any]) -> str:
    """One run."""
    stalls = ", ".join(f"{k} {v:.1f}" for k, v in row["stall_s_by_phase"].items() if v >= 0.05)
    return (
        f"seed {row['seed']}  {row['system']:10} {row['goodput_tokens_per_s']:8.0f} tok/s  ETTR "
        f"{row['ettr']:.3f}  step {row['steps']}  lost {row['steps_lost']}  kills {row['kills']}  "
        f"lives {row['lives']}  PLT {row['plt']:.2%}  loss {row['loss']:.3f}  CPU {row['cpu']:.0%}"
        f"  stalls (s): {stalls or 'none'}"
    )


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds, their spread, and the ratio of Lazarus to each."""
    found = []
    ours = {r["seed"]: r["goodput_tokens_per_s"] for r in rows if r["system"] == LAZARUS}
    for name in dict.fromkeys(r["system"] for r in rows):
        mine = [r for r in rows if r["system"] == name]
        goodput = [float(r["goodput_tokens_per_s"]) for r in mine]
        ratios = [ours[r["seed"]] / max(1e-9, r["goodput_tokens_per_s"]) for r in mine if ours]
        medians = {
            key: statistics.median(float(r[key]) for r in mine)
            for key in ("ettr", "steps_lost", "loss", "plt", "cpu", "step_s", "save_s", "restart_s")
        }
        found.append(
            {
                "system": name,
                "every": mine[0]["every"],
                "goodput_tokens_per_s": statistics.median(goodput),
                "lowest": min(goodput),
                "highest": max(goodput),
                "lazarus_over_it": statistics.median(ratios) if ratios else None,
                "stall_s": statistics.median(sum(r["stall_s_by_phase"].values()) for r in mine),
                **medians,
            }
        )
    return found


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Goodput is in tokens per second; a save is due every so many steps; stalls are seconds."""
    names = {"goodput": 8, "low..high": 12, "Lazarus/it": 10, "ETTR": 6, "every": 6, "lost": 5,
             "stall": 6, "PLT": 6, "loss": 6, "CPU": 5}  # fmt: skip
    lines = [" ".join([f"{'system':17}", *(f"{name:>{width}}" for name, width in names.items())])]
    for row in summary:
        ratio = row["lazarus_over_it"]
        shown = "" if ratio is None else f"{ratio:.2f}"
        spread = f"{row['lowest']:.0f}..{row['highest']:.0f}"
        lines.append(
            f"{row['system']:17} {row['goodput_tokens_per_s']:8.0f} {spread:>12} {shown:>10} "
            f"{row['ettr']:6.3f} {row['every'] or '-':>6} {row['steps_lost']:5.0f} "
            f"{row['stall_s']:6.1f} {row['plt']:6.2%} {row['loss']:6.3f} {row['cpu']:5.0%}"
        )
    return "\n".join(lines)


def compared(plan: Plan, summary: Sequence[Mapping[str, Any]]) -> str:
    """The paper's proportions and those of the baselines that ran."""
    bed = plan.shape.testbed
    lines = [f"{'paper, DS (est.)':17} {of_testbed(bed).text()}"]
    for row in (r for r in summary if r["every"] and r["step_s"]):
        found = proportions(
            period_s=plan.period_s, step_s=row["step_s"], every=row["every"],
            save_s=row["save_s"], restart_s=row["restart_s"],
        )  # fmt: skip
        lines.append(f"{row['system']:17} {found.text()}")
    return "\n".join(lines)

"""How long from SIGKILL of one of 8 ranks to the next committed step? Ours, torchft, torchrun.

    python benchmarks/recovery_time.py [--quick] [--json FILE] [--kills K] [--ft-python PYTHON]
    python benchmarks/recovery_time.py --against CHECKOUT [--rounds N] [--kills K]

Ours: one run of 8 nodes; node after node is killed, in phase after phase of the step, and a
new one joins after each kill. Times come from the run's record: from ``fault_injected`` (written
before the victim dies) to the first step that the next generation commits, its redo included.
torchft runs in its own environment (``--ft-python``: an interpreter that has torchft-nightly),
with its defaults and tuned, killed at a step boundary and inside the all-reduce; torchrun
restarts all ranks from a checkpoint. Peers train a small transformer of their own, so each figure
is also given minus one step of its own system. On a loaded machine steps differ several times
over; "until redo" (detect, release, align, plan, groups, transfer) leaves the redone step out.
``--against`` compares this checkout with another one of Lazarus (a git worktree of an older
revision): their runs alternate, round by round, and the order within a round alternates too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
from recovery_peers import Kill, torchft, torchrun

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("data", "forward", "dispatch", "combine", "backward", "grad_sync", "commit", "optimizer")
TIMELINE = ("detect", "release", "align", "plan", "groups", "transfer", "redo")
SETTINGS = (
    "cluster.launcher=process",
    "cluster.join_debounce_s=0.2",
    "model.layers=2",
    "model.dim=128",
    "model.heads=4",
    "model.seq_len=64",
    "model.experts=8",
    "model.top_k=2",
    "model.moe_every=1",
    "model.ffn_mult=2",
    "train.global_batch=16",
    "train.micro_batch_size=4",  # one round at 8 ranks and at 7
    "placement.slots_per_node=4",
    "checkpoint.every=0",
    "checkpoint.full_at_end=false",
    "recovery.tolerated_stall_s=20",
    "metrics.progress=off",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one system did."""

    system: str
    where: str
    kills: int
    median_s: float
    worst_s: float
    step_s: float
    note: str = ""

    def __str__(self) -> str:
        return (
            f"{self.system:26} {self.where:11} {self.kills:3}  median {self.median_s:7.3f} s  "
            f"minus a step {self.median_s - self.step_s:7.3f} s  worst {self.worst_s:7.3f} s  "
            f"step {self.step_s * 1e3:6.0f} ms  {self.note}"
        )


# ---- ours --------------------------------------------------------------------------------------


def ours(kills: int, *, ranks: int, gap: int, folder: Path) -> list[Kill]:
    """One run with all the kills; node 0 lives, since it asks for the joiners."""
    from lazarus import ElasticTrainer, TrainConfig
    from lazarus.record.events import read_events
    from lazarus.record.metrics import committed_steps, recoveries

    faults = []
    for i in range(kills):
        step = gap * (i + 1)
        faults += [f"kill:{i + 1}@{step}/{PHASES[i % len(PHASES)]}", f"join@{step + 3}"]
    overrides = [
        *SETTINGS,
        f"cluster.nodes={ranks}",
        f"train.steps={gap * (kills + 1)}",
        f"run.dir={folder}",
    ]
    ElasticTrainer(TrainConfig.load(overrides=overrides), faults=faults).fit()
    events = read_events(folder)
    steps = committed_steps(events)
    walls = [float(e["wall_s"]) for e in steps.values() if e["num_nodes"] == ranks]
    fired = {e["node"]: e for e in events if e["event"] == "fault_injected" and e["kind"] == "kill"}
    found = []
    for loss in recoveries(events):
        if loss.back_s is not None and loss.node in fired:
            before = steps.get(int(fired[loss.node]["step"]) - 1)
            found.append(
                Kill(
                    system="lazarus",
                    where=str(fired[loss.node]["phase"]),
                    back_s=loss.back_s,
                    step_s=statistics.median(walls),
                    num_ranks=int(before["num_nodes"]) if before else ranks,
                    timeline=dict(loss.phases),
                )
            )
    return found


def rows_of_ours(kills: Sequence[Kill], *, ranks: int) -> list[Row]:
    full = [kill for kill in kills if kill.num_ranks == ranks]
    rows = []
    for where in (*PHASES, "all"):
        group = [k for k in full if where in ("all", k.where)]
        if group:
            backs = [k.back_s for k in group]
            rows.append(
                Row(
                    system="lazarus",
                    where=where,
                    kills=len(group),
                    median_s=statistics.median(backs),
                    worst_s=max(backs),
                    step_s=group[0].step_s,
                )
            )
    return rows


def timeline_text(kills: Sequence[Kill]) -> str:
    """Where the time goes: median and worst of each phase of the recovery."""
    ahead = [sum(v for n, v in k.timeline.items() if n in TIMELINE[:-1]) for k in kills]
    parts = [f"until redo {statistics.median(ahead):.3f} (worst {max(ahead):.3f}): "]
    for name in TIMELINE:
        values = [k.timeline[name] for k in kills if name in k.timeline]
        if values:
            parts.append(f"{name} {statistics.median(values):.3f} (worst {max(values):.3f})")
    return "  ".join(parts)


# ---- peers -------------------------------------------------------------------------------------


def peers(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Every peer that is installed, kill by kill."""
    rows = []
    cases: list[tuple[str, str, Any]] = []
    for where in ("boundary", "collective"):
        cases.append(
            (
                "torchrun + checkpoint",
                where,
                lambda f, w=where: torchrun(where=w, ranks=args.ranks, folder=f, limit_s=240),
            )
        )
        if args.ft_python.exists():
            for tuned in (True, False):
                cases.append(
                    (
                        f"torchft {'tuned' if tuned else 'default'}",
                        where,
                        lambda f, w=where, t=tuned: torchft(
                            args.ft_python,
                            tuned=t,
                            where=w,
                            ranks=args.ranks,
                            folder=f,
                            limit_s=240,
                        ),
                    )
                )
    for number, (name, where, run) in enumerate(cases):
        found = [run(folder / f"peer-{number}-{i}") for i in range(args.peer_kills)]
        back = [kill for kill in found if kill is not None]
        if not back:
            print(f"{name:26} {where:11} no recovery within the limit, or it did not start")
            continue
        row = Row(
            system=name,
            where=where,
            kills=len(back),
            median_s=statistics.median(k.back_s for k in back),
            worst_s=max(k.back_s for k in back),
            step_s=statistics.median(k.step_s for k in back),
            note="" if len(back) == len(found) else f"{len(found) - len(back)} never came back",
        )
        print(row, flush=True)
        rows.append(row)
    return rows


# ---- another checkout --------------------------------------------------------------------------


def kills_of(checkout: Path, args: argparse.Namespace, out: Path) -> list[Kill]:
    """What the code of one checkout does, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "recovery_time.py"), "--no-peers"]
    for name in ("kills", "ranks", "gap"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(
        [*command, "--json", str(out)], env=environment, cwd=checkout, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return [Kill(**kill) for kill in json.loads(out.read_text())["kills"]]


def against(args: argparse.Namespace, folder: Path) -> None:
    """Both checkouts in turn; every round's medians, then all kills together."""
    trees = {"old": args.against.resolve(), "new": ROOT}
    found: dict[str, list[Kill]] = {name: [] for name in trees}
    for number in range(args.rounds):
        order = list(trees) if number % 2 == 0 else list(reversed(trees))
        for name in order:
            kills = kills_of(trees[name], args, folder / f"{name}-{number}.json")
            kills = [kill for kill in kills if kill.num_ranks == args.ranks]
            found[name] += kills
            print(f"round {number + 1}  {compared(name, kills)}", flush=True)
    for name, kills in found.items():
        print(f"all      {compared(name, kills)}")
        print(f"         {timeline_text(kills)}")


def compared(name: str, kills: Sequence[Kill]) -> str:
    """One line: how long it takes to be back, beside a step of the same run."""
    beyond = [kill.back_s - kill.step_s for kill in kills]
    ahead = [sum(v for n, v in k.timeline.items() if n in TIMELINE[:-1]) for k in kills]
    return (
        f"{name:4} {len(kills):3} kills  minus a step {statistics.median(beyond):7.3f} s "
        f"(worst {max(beyond):.3f})  until redo {statistics.median(ahead):7.3f} s "
        f"(worst {max(ahead):.3f})  step {statistics.median(k.step_s for k in kills) * 1e3:5.0f} ms"
    )


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 kills, 4 ranks, no peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kills", type=int, default=24, help="of ours; 0: peers only")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--gap", type=int, default=40, help="steps between two kills")
    parser.add_argument("--peer-kills", type=int, default=3, help="of each peer and place")
    parser.add_argument("--ft-python", type=Path, default=ROOT / ".venv-torchft/bin/python")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another one of Lazarus")
    parser.add_argument("--rounds", type=int, default=3, help="of both, with --against")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.ranks, args.gap, args.no_peers = 4, 4, 20, True
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    load = os.getloadavg()
    print(f"{os.cpu_count()} cores, load before {load[0]:.1f}, {args.ranks} ranks", flush=True)
    try:
        if args.against is not None:
            against(args, folder)
            return 0
        kills: list[Kill] = []
        rows: list[Row] = []
        if args.kills:
            kills = ours(args.kills, ranks=args.ranks, gap=args.gap, folder=folder / "ours")
            rows = rows_of_ours(kills, ranks=args.ranks)
            print("\n".join(map(str, rows)))
            print(f"where the time goes: {timeline_text(kills)}")
        fewer = [k for k in kills if k.num_ranks != args.ranks]
        if fewer:
            print(f"{len(fewer)} of {len(kills)} kills left out: the joiner was not there yet")
        if not args.no_peers:
            rows += peers(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        content = {
            "load": load,
            "rows": [asdict(row) for row in rows],
            "kills": [asdict(k) for k in kills],
        }
        args.json.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

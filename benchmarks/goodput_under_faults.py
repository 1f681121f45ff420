"""How much is trained while nodes die? The same model, data, seed and faults through each system.

    python benchmarks/goodput_under_faults.py [--quick] [--json FILE] [--systems a,b,c,d,e]

a  Lazarus: every expert has two replicas.
b  our trainer as DeepSpeed would run it ("DS"): each expert once, every loss ends all processes,
   which start again from the last full checkpoint on the nodes that divide the experts.
c  the same with reconfiguration but no replicas ("DS(FT)"): the processes stay, the state of all
   goes back to the last full checkpoint.
d  the real DeepSpeed-MoE under torchrun (``--ds-python``), started again at once from its last
   checkpoint, on the nodes that divide the experts.
e  torchft data parallel with all experts in every group (``--ft-python``), tuned time-outs; its
   global batch shrinks with every lost group.

Goodput counts tokens of committed steps that were not rolled back, from the first commit on, over
the same wall time for every system. A node that every system has in use is killed (SIGKILL) every
``--period`` seconds until half are left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import goodput_peers

from lazarus.events import read_events
from lazarus.metrics import committed_steps, plt
from lazarus.simulate.traces import read_trace, segment

EXPERTS = 12
TOKENS = 16 * 64  # of one step
MODEL = (
    "cluster.launcher=process", "metrics.progress=off", "model.layers=4", "model.dim=64",
    "model.heads=4", "model.seq_len=64", "model.vocab=256", f"model.experts={EXPERTS}",
    "model.top_k=2", "model.moe_every=2", "model.ffn_mult=4", "train.global_batch=16",
    "train.micro_batch_size=4", "train.steps=100000", "optim.lr=0.001", "optim.warmup_steps=20",
    "checkpoint.full_at_end=false", "recovery.tolerated_stall_s=10", "cluster.min_nodes=1",
)  # fmt: skip
NAMES = {"a": "Lazarus", "b": "DS", "c": "DS(FT)", "d": "DeepSpeed", "e": "torchft"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all systems go through: seconds since the first commit at which a node dies."""

    name: str
    nodes: int
    wall_s: float
    kills_s: tuple[float, ...]
    every_b: int
    every_c: int


def periodic(args: argparse.Namespace, seed: int) -> Plan:
    """A kill every period, shifted a little by the seed, until half of the nodes are left."""
    shift = random.Random(seed).uniform(-0.2, 0.2) * args.period
    count = args.nodes - args.nodes // 2
    kills = tuple(args.period * (i + 1) + shift for i in range(count))
    wall = args.period * (count + 1)
    return _plan(f"every {args.period:g} s", args, wall, kills)


def poisson(args: argparse.Namespace, seed: int) -> Plan:
    """Exponential gaps with the same mean."""
    rng, at_s, kills = random.Random(seed), 0.0, []
    wall = args.period * (args.nodes - args.nodes // 2 + 1)
    while len(kills) < args.nodes - args.nodes // 2:
        at_s += rng.expovariate(1 / args.period)
        if at_s >= wall - 5:
            break
        kills.append(at_s)
    return _plan(f"Poisson {args.period:g} s", args, wall, tuple(kills))


def traced(args: argparse.Namespace, seed: int) -> Plan:
    """The removals of a spot trace; its adds are left out."""
    del seed
    wall = args.period * (args.nodes - args.nodes // 2 + 1)
    trace = read_trace(args.trace, time_scale=args.time_scale)
    first = next((e.at_s for e in trace.events if e.kind == "remove"), 0.0)
    part = segment(trace, start_s=first - 5, length_s=wall - 5, most_nodes=args.nodes)
    kills = [e.at_s for e in part.events if e.kind == "remove" for _ in e.nodes]
    return _plan(Path(args.trace).name, args, wall, tuple(kills[: args.nodes // 2]))


def _plan(name: str, args: argparse.Namespace, wall: float, kills: tuple[float, ...]) -> Plan:
    return Plan(
        name=name, nodes=args.nodes, wall_s=wall, kills_s=kills,
        every_b=args.full_every, every_c=args.ft_every,
    )  # fmt: skip


# ---- one life of a run, in a process of its own --------------------------------------------------


def life(spec: Mapping[str, Any]) -> int:
    """Train until told to stop; ``kill`` on stdin ends one node, the lowest."""
    from lazarus import ElasticTrainer, TrainConfig
    from lazarus.errors import LazarusError

    handle = ElasticTrainer(TrainConfig.load(overrides=list(spec["overrides"]))).start(
        resume=spec["resume"]
    )

    def listen() -> None:
        for line in sys.stdin:
            driver = handle._driver  # the benchmark plays the machine that takes nodes away
            live = driver.live_nodes()
            if line.strip() == "kill" and len(live) > 1:
                driver.inject("kill", live[0], "bench")
            elif line.strip() == "stop":
                handle.stop(now=True)

    threading.Thread(target=listen, daemon=True).start()
    try:
        handle.wait()
    except LazarusError as error:
        print(f"over: {error}", flush=True)
        return 3
    return 0


@dataclass
class Life:
    """The process of one life."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, overrides: Sequence[str], *, resume: str | None, log: Path) -> Life:
        spec = json.dumps({"overrides": list(overrides), "resume": resume})
        with log.open("a") as out:
            return cls(
                subprocess.Popen(
                    [sys.executable, __file__, "--life", spec],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has just ended; the loop will see

    def end(self) -> None:
        self.tell("stop")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def usable(system: str, live: int) -> int:
    """Nodes that a start can use: fixed expert parallelism needs a divisor of the experts."""
    if system not in ("b", "d"):
        return live
    return max(n for n in range(1, live + 1) if EXPERTS % n == 0)


def overrides(system: str, plan: Plan, folder: Path, *, nodes: int, seed: int) -> list[str]:
    """The configuration of one system."""
    given = {
        "a": ["placement.min_replicas=2", "placement.slots_per_node=6", "checkpoint.every=100"],
        "b": ["placement.min_replicas=1", f"placement.slots_per_node={EXPERTS // nodes}",
              "recovery.on_lost_expert=fail", "checkpoint.select=full",
              f"checkpoint.every={plan.every_b}"],
        "c": ["placement.min_replicas=1", "placement.slots_per_node=auto",
              "placement.spare_losses=0", "recovery.on_lost_expert=rollback",
              "checkpoint.select=full", f"checkpoint.every={plan.every_c}"],
    }[system]  # fmt: skip
    return [*MODEL, *given, f"cluster.nodes={nodes}", f"run.dir={folder}", f"run.seed={seed}"]


def measure(system: str, plan: Plan, *, seed: int, folder: Path) -> dict[str, Any]:
    """One system through one plan."""
    live, lives, pending = plan.nodes, 1, list(plan.kills_s)
    log = folder.with_suffix(".log")
    given = overrides(system, plan, folder, nodes=usable(system, live), seed=seed)
    running = Life.start(given, resume=None, log=log)
    began = _first_commit(folder, running, log)
    while (now := time.time() - began) < plan.wall_s:
        if pending and now >= pending[0]:
            pending.pop(0)
            live -= 1
            running.tell("kill")
        if running.over:
            lives += 1
            given = overrides(system, plan, folder, nodes=usable(system, live), seed=seed)
            running = Life.start(given, resume="auto", log=log)
        time.sleep(0.02)
    running.end()
    return {**figures(folder, began, plan), "system": NAMES[system], "seed": seed, "lives": lives}


def _first_commit(folder: Path, running: Life, log: Path, *, limit_s: float = 300.0) -> float:
    started = time.monotonic()
    while time.monotonic() - started < limit_s and not running.over:
        if (folder / "events.jsonl").exists():
            for event in read_events(folder):
                if event["event"] == "step_committed":
                    return float(event["t"])
        time.sleep(0.1)
    running.end()
    raise SystemExit(
        f"no step was committed within {limit_s} s; see {log}:\n{log.read_text()[-800:]}"
    )


def figures(folder: Path, began: float, plan: Plan) -> dict[str, Any]:
    """What the record says of the measured window."""
    events = [e for e in read_events(folder) if e["t"] <= began + plan.wall_s]
    counted = committed_steps(events)
    inside = [e for e in counted.values() if e["t"] > began]
    made = sum(e["event"] == "step_committed" for e in events)
    phases: dict[str, float] = {}
    for event in events:
        if event["event"] == "reconfigured":
            for name, seconds in event["phases"].items():
                phases[name] = phases.get(name, 0.0) + float(seconds)
    productive = sum(float(e["wall_s"]) for e in inside)
    last = max(counted, default=0)
    return {
        "goodput_tokens_per_s": sum(int(e["tokens"]) for e in inside) / plan.wall_s,
        "ettr": min(1.0, productive / plan.wall_s),
        "steps": last,
        "steps_lost": made - len(counted),
        "kills": sum(e["event"] == "node_lost" for e in events),
        "experts_restored": sum(e["event"] == "expert_restored" for e in events),
        "lost_copies": sum(
            float(e["lost_copies"]) for e in events if e["event"] == "expert_restored"
        ),
        "plt": plt(events),
        "loss": counted[last]["loss"] if counted else None,  # at equal wall time
        "stall_s_by_phase": {k: round(v, 3) for k, v in phases.items()},
    }


# ---- peers ---------------------------------------------------------------------------------------


def measure_peer(
    system: str, plan: Plan, *, seed: int, folder: Path, python: str
) -> dict[str, Any]:
    """A real peer through one plan."""

    def start(nodes: int) -> goodput_peers.Group:
        if system == "e":
            return goodput_peers.torchft(python, folder, nodes=nodes, seed=seed)
        return goodput_peers.deepspeed(python, folder, nodes=nodes, every=plan.every_b, seed=seed)

    live, lives, pending = plan.nodes, 1, list(plan.kills_s)
    running = start(usable(system, live))
    try:
        began = goodput_peers.first_commit(folder, running)
        while (now := time.time() - began) < plan.wall_s:
            if pending and now >= pending[0]:
                pending.pop(0)
                live -= 1
                running.tell("kill")
            if running.over:
                running.end()
                lives += 1
                running = start(usable(system, live))
            time.sleep(0.02)
    finally:
        running.end()
    found = goodput_peers.figures(
        goodput_peers.read_log(folder), began=began, wall_s=plan.wall_s,
        kills=len(plan.kills_s) - len(pending),
    )  # fmt: skip
    return {**found, "system": NAMES[system], "seed": seed, "lives": lives}


# ---- all together --------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--systems", default="a,b,c,d,e")
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--period", type=float, default=25.0)
    parser.add_argument("--schedule", choices=("periodic", "poisson", "trace"), default="periodic")
    parser.add_argument("--trace", metavar="FILE")
    parser.add_argument("--time-scale", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    # As the paper runs its baselines at a failure every 5 minutes.
    parser.add_argument("--full-every", type=int, default=50, help="steps between checkpoints of b")
    parser.add_argument("--ft-every", type=int, default=250, help="the same of c")
    parser.add_argument("--ds-python", default=sys.executable, help="that has DeepSpeed")
    parser.add_argument("--ft-python", default=sys.executable, help="that has torchft")
    parser.add_argument("--life", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.life:
        return life(json.loads(args.life))
    make = {"periodic": periodic, "poisson": poisson, "trace": traced}[args.schedule]
    rows: list[dict[str, Any]] = []
    pythons = {"d": args.ds_python, "e": args.ft_python}
    wanted = args.systems.split(",")
    why_not = {s: goodput_peers.missing(s, pythons.get(s, "")) for s in wanted}
    skipped = {NAMES[s]: why for s, why in why_not.items() if why}
    with tempfile.TemporaryDirectory(prefix="goodput-") as scratch:
        for seed in range(1 if args.quick else args.seeds):
            plan = make(args, seed)
            for system in (s for s in wanted if not why_not[s]):
                folder = Path(scratch) / f"{system}{seed}"
                if system in pythons:
                    row = measure_peer(
                        system, plan, seed=seed, folder=folder, python=pythons[system]
                    )
                else:
                    row = measure(system, plan, seed=seed, folder=folder)
                rows.append({**row, "schedule": plan.name})
                print(_line(rows[-1]), flush=True)
    summary = summarise(rows)
    print(_table(summary))
    for name, why in skipped.items():
        print(f"{name:10} not measured: {why}")
    if args.json:
        result = {"schema": 1, "rows": rows, "summary": summary, "skipped": skipped}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"seed {row['seed']}  {row['system']:10} {row['goodput_tokens_per_s']:8.0f} tok/s  ETTR "
        f"{row['ettr']:.3f}  step {row['steps']}  lost {row['steps_lost']}  kills {row['kills']}  "
        f"lives {row['lives']}  PLT {row['plt']:.2%}  loss {row['loss']:.3f}"
    )


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over seeds, their spread, and the ratio of Lazarus to each."""
    found = []
    ours = {r["seed"]: r["goodput_tokens_per_s"] for r in rows if r["system"] == "Lazarus"}
    for name in dict.fromkeys(r["system"] for r in rows):
        mine = [r for r in rows if r["system"] == name]
        goodput = [float(r["goodput_tokens_per_s"]) for r in mine]
        ratios = [ours[r["seed"]] / max(1e-9, r["goodput_tokens_per_s"]) for r in mine if ours]
        found.append(
            {
                "system": name,
                "goodput_tokens_per_s": statistics.median(goodput),
                "lowest": min(goodput),
                "highest": max(goodput),
                "lazarus_over_it": statistics.median(ratios) if ratios else None,
                "ettr": statistics.median(float(r["ettr"]) for r in mine),
                "steps_lost": statistics.median(int(r["steps_lost"]) for r in mine),
                "loss": statistics.median(float(r["loss"]) for r in mine),
            }
        )
    return found


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'system':10} {'goodput':>8} {'low..high':>14} {'Lazarus/it':>10} {'ETTR':>6} "
             f"{'lost':>6} {'loss':>6}"]  # fmt: skip
    for row in summary:
        ratio = row["lazarus_over_it"]
        shown = "" if ratio is None else f"{ratio:.2f}"
        spread = f"{row['lowest']:.0f}..{row['highest']:.0f}"
        lines.append(
            f"{row['system']:10} {row['goodput_tokens_per_s']:8.0f} {spread:>14} {shown:>10} "
            f"{row['ettr']:6.3f} {row['steps_lost']:6.0f} {row['loss']:6.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

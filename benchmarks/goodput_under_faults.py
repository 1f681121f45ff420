"""How much is trained while nodes die? The same model, data, seed and faults through each system.

    python benchmarks/goodput_under_faults.py [--quick] [--json FILE] [--systems a,b,B,c,C,d,e]

a  Lazarus: every expert has two replicas; partial checkpoints in the background.
b  our trainer as DeepSpeed would run it ("DS"): each expert once, every loss ends all processes,
   which start again from the last full checkpoint on the nodes that divide the experts. A rank's
   process imports torch anew (``--warm-starts``: it is forked) while the one who starts it stays,
   as under torchrun; training waits for every save.
B  the same, saving as often as costs least by Young's formula with what b's run measured.
c  b with reconfiguration but no replicas ("DS(FT)"): the processes stay, the state of all goes
   back to the last full checkpoint.
C  c, saving as often as costs least by what c's run measured.
d  the real DeepSpeed-MoE under torchrun (``--ds-python``), started again at once from its last
   checkpoint, on the nodes that divide the experts.
e  torchft data parallel with all experts in every group (``--ft-python``), tuned time-outs; its
   global batch shrinks with every lost group.

Goodput counts tokens of committed steps that were not rolled back, from the first commit on, over
the same wall time for every system. A node that every system has in use is killed (SIGKILL) every
``--period`` seconds (``--jitter`` draws each gap by the seed) until half are left. No node joins,
also where a ``--trace`` adds some.

Two cores play six nodes. So that a lost node takes its compute with it, every rank, the peers'
too, has a modelled device: a sample takes at least ``--device-ms``, the experts' part of it where
its experts are. And a full checkpoint takes at least ``--write-s``, to write and to read: the
share of the fault period that it takes on the paper's testbed. 0 turns each off. Processes,
exchanges, losses and recoveries are real.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import goodput_peers
import goodput_plans as plans
import goodput_tables as tables
from goodput_modelled import Device, Modelled
from goodput_plans import Plan
from goodput_shapes import SHAPES, best_every

from lazarus.record.events import read_events

NAMES = {"a": tables.LAZARUS, "b": "DS", "B": "DS, best interval", "c": "DS(FT)",
         "C": "DS(FT), best interval", "d": "DeepSpeed", "e": "torchft"}  # fmt: skip


# ---- one life of a run, in a process of its own --------------------------------------------------


def life() -> int:
    """Train as the first line of stdin says, until told to stop; ``kill`` ends the lowest node."""
    from lazarus import ElasticTrainer, TrainConfig
    from lazarus.errors import LazarusError

    line = sys.stdin.readline()
    if not line.startswith("{"):
        return 0  # it was never needed
    spec = json.loads(line)
    given = spec["modelled"]
    modelled = Modelled(
        **{**given, "device": Device(**given["device"]), "url": Path(given["url"]),
           "log": Path(given["log"])}
    )  # fmt: skip
    trainer = ElasticTrainer(
        TrainConfig.load(overrides=list(spec["overrides"])), loss=modelled.loss, hooks=[modelled]
    )
    handle = trainer.start(resume=spec["resume"])

    def listen() -> None:
        driver = handle._driver  # the benchmark plays the machine that takes nodes away
        for line in sys.stdin:
            while not driver.live_nodes():  # it is still starting
                time.sleep(0.02)
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
    """The process of one life. What it leaves in temporary folders goes with the benchmark's."""

    process: subprocess.Popen[str]

    @classmethod
    def prepare(cls, *, log: Path) -> Life:
        """A process that has imported the library and waits to be told what to train."""
        with log.open("a") as out:
            return cls(
                subprocess.Popen(
                    [sys.executable, __file__, "--life"],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)},
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

    def strike(self) -> None:
        """End all its processes at once: they die with it."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.tell("stop")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def device_of(plan: Plan) -> dict[str, float]:
    """What every rank computes on; ``goodput_modelled.Device`` as JSON."""
    timing = plan.timing
    return {
        "sample_s": timing.device_s, "expert_part": timing.expert_part, "rows": plan.shape.rows,
    }  # fmt: skip


def life_spec(
    system: str, plan: Plan, folder: Path, *, live: int, seed: int, resumes: bool, is_warm: bool
) -> dict[str, Any]:
    """What a life of one of our systems is told, as JSON."""
    nodes = plans.usable(system, plan, live)
    checkpoints = folder / "checkpoints"
    return {
        "overrides": plans.overrides(system, plan, folder, nodes=nodes, seed=seed, is_warm=is_warm),
        "resume": "auto" if resumes else None,
        "modelled": {
            "device": device_of(plan),
            "write_s": plan.timing.write_s,
            "every": plans.saves_every(system, plan),
            "url": str(checkpoints),
            "log": str(tables.waits_of(folder)),
            "reads": resumes and any(checkpoints.glob("*/manifest.json")),
        },
    }


def measure(
    system: str, plan: Plan, *, seed: int, folder: Path, is_warm: bool = False
) -> dict[str, Any]:
    """One of our systems through one plan."""
    live, lives, pending = plan.nodes, 1, list(plan.kills_s)
    log = folder.with_suffix(".log")
    restarts = system in ("b", "B")

    def start(running: Life, *, resumes: bool) -> Life:
        spec = life_spec(
            system, plan, folder, live=live, seed=seed, resumes=resumes, is_warm=is_warm
        )
        running.tell(json.dumps(spec))
        return running

    running = start(Life.prepare(log=log), resumes=False)
    began = _first_commit(folder, running, log)
    # The one who starts the ranks of a restart stays, as torchrun's agents do.
    standby = Life.prepare(log=log) if restarts else None
    watch = Watch(NAMES[system], plan)
    while (now := time.time() - began) < plan.wall_s and not running.over:
        if pending and now >= pending[0]:
            pending.pop(0)
            live -= 1
            if standby is None:
                running.tell("kill")
            else:
                lives += 1
                running.strike()
                running, standby = start(standby, resumes=True), Life.prepare(log=log)
        watch.show(now, live=live, lives=lives)
        time.sleep(0.02)
    cpu = watch.cpu()
    for process in (running, standby):
        if process is not None:
            process.end()
    found = tables.figures(folder, began, plan)
    return {**found, "kills": len(plan.kills_s) - len(pending), "lives": lives, "cpu": cpu}


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


# ---- peers ---------------------------------------------------------------------------------------


def measure_peer(
    system: str, plan: Plan, *, seed: int, folder: Path, python: str
) -> dict[str, Any]:
    """A real peer through one plan."""
    work = {"shape": plan.shape.name, "seed": seed, "every": plans.saves_every(system, plan),
            "device": device_of(plan), "write_s": plan.timing.write_s}  # fmt: skip

    def start() -> goodput_peers.Group:
        make = goodput_peers.torchft if system == "e" else goodput_peers.deepspeed
        return make(python, folder, nodes=plans.usable(system, plan, live), spec=work)

    live, lives, pending = plan.nodes, 1, list(plan.kills_s)
    running = start()
    try:
        began = goodput_peers.first_commit(folder, running)
        watch = Watch(NAMES[system], plan)
        while (now := time.time() - began) < plan.wall_s:
            if pending and now >= pending[0]:
                pending.pop(0)
                live -= 1
                running.tell("kill")
            if running.over:
                running.end()
                lives += 1
                running = start()
            watch.show(now, live=live, lives=lives)
            time.sleep(0.02)
        cpu = watch.cpu()
    finally:
        running.end()
    found = tables.peer_figures(
        goodput_peers.read_log(folder), began=began, wall_s=plan.wall_s,
        kills=len(plan.kills_s) - len(pending),
    )  # fmt: skip
    return {**found, "lives": lives, "cpu": cpu}


class Watch:
    """Progress while a system runs, and the machine's CPU time meanwhile."""

    def __init__(self, name: str, plan: Plan) -> None:
        self._name, self._wall_s = name, plan.wall_s
        self._redraws = sys.stderr.isatty()
        self._shown_s = -float("inf")
        self._began = _cpu_ticks()

    def show(self, now: float, *, live: int, lives: int) -> None:
        """A line that is redrawn on a terminal; one per 10 s elsewhere."""
        if now - self._shown_s < (0.5 if self._redraws else 10.0):
            return
        self._shown_s = now
        text = f"{self._name}: {now:.0f} of {self._wall_s:.0f} s, {live} nodes, life {lives}"
        print(f"\r{text:60}" if self._redraws else text, end="" if self._redraws else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def cpu(self) -> float:
        """Part of all cores' time that was used since the beginning, by whomever."""
        if self._redraws:
            print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
        busy, total = (now - then for now, then in zip(_cpu_ticks(), self._began, strict=True))
        return busy / max(1, total)


def _cpu_ticks() -> tuple[int, int]:
    """Busy and all ticks of this machine."""
    ticks = [int(t) for t in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


# ---- all together --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed")
    add("--json", metavar="FILE")
    add("--systems", default="a,b,B,c,C,d,e")
    add("--shape", choices=sorted(SHAPES), default="l", help="after the paper's GPT-S or GPT-L")
    add("--nodes", type=int, default=6)
    add("--period", type=float, default=20.0, help="seconds between faults")
    add("--jitter", type=float, default=0.0, help="part of the period by which gaps differ")
    add("--device-ms", type=float, default=25.0, help="of a modelled device per sample; 0: none")
    add("--write-s", type=float, help="of a full checkpoint; none: the paper's share of the period")
    add("--warm-starts", action="store_true", help="DS forks its ranks from a warm process")
    add("--schedule", choices=("periodic", "poisson", "trace"), default="periodic")
    add(
        "--trace",
        metavar="FILE",
        help="of --schedule trace: its first removals become kills, up "
        "to half of the\nnodes; nodes that it adds, and later removals, are left out and counted",
    )
    add("--time-scale", type=float, default=0.02, help="multiplies the times of the trace")
    add("--seeds", type=int, default=3)
    add("--ds-python", default=sys.executable, help="that has DeepSpeed")
    add("--ft-python", default=sys.executable, help="that has torchft")
    add("--life", action="store_true", help=argparse.SUPPRESS)
    return plans.checked(parser, parser.parse_args())


def main() -> int:
    args = arguments()
    if args.life:
        return life()
    pythons = {"d": args.ds_python, "e": args.ft_python}
    wanted = args.systems.split(",")
    why_not = {s: goodput_peers.missing(s, pythons.get(s, "")) for s in wanted}
    skipped = {NAMES[s]: why for s, why in why_not.items() if why}
    make = {"periodic": plans.periodic, "poisson": plans.poisson, "trace": plans.traced}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="goodput-") as scratch:
        for seed in range(1 if args.quick else args.seeds):
            plan = make[args.schedule](args, seed)
            print(plans.assumptions(plan), flush=True)
            for system in (s for s in wanted if not why_not[s]):
                folder = Path(scratch) / f"{system}{seed}"
                own = _at_best(system, plan, rows) if system in "BC" else plan
                if system in pythons:
                    row = measure_peer(
                        system, own, seed=seed, folder=folder, python=pythons[system]
                    )
                else:
                    row = measure(system, own, seed=seed, folder=folder, is_warm=args.warm_starts)
                row |= {"system": NAMES[system], "seed": seed, "schedule": plan.name,
                        "every": plans.saves_every(system, own)}  # fmt: skip
                rows.append(row)
                print(tables.line(row), flush=True)
    summary = tables.summarise(rows)
    print(f"{tables.table(summary)}\n{tables.compared(plan, summary)}")
    for name, why in skipped.items():
        print(f"{name:10} not measured: {why}")
    if args.json:
        result = {"schema": 2, "rows": rows, "summary": summary, "skipped": skipped,
                  "left_out": plan.left_out}  # fmt: skip
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _at_best(system: str, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan with the interval that costs least, by what b or c measured in this very run."""
    like = system.lower()
    measured = [r for r in rows if r["system"] == NAMES[like]]
    if not measured:
        raise SystemExit(f"error: {system} needs the figures of {like}; name it first")
    last = measured[-1]
    save_s = max(0.001, last["save_s"] or plan.timing.write_s)
    every = best_every(save_s=save_s, period_s=plan.period_s, step_s=last["step_s"])
    return replace(plan, timing=replace(plan.timing, **{f"every_{like}": every}))


if __name__ == "__main__":
    sys.exit(main())

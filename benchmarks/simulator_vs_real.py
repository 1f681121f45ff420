"""Does the simulator say what real runs do? Goodput and recovery time of five runs, predicted.

    python benchmarks/simulator_vs_real.py [--quick] [--rounds N] [--json FILE] [--keep DIR]

Five real runs of different sizes and schedules, in rounds. Each is predicted with a cost model
calibrated from the other four runs of its round (``lazarus calibrate``), given only its size and
the moments of its faults. Figures are medians over the rounds, errors too: a machine that others
use as well is faster in one round than in the next, so each run is held against the prediction of
its own round. It is also faster in one run than in the next; the second pair of columns therefore
takes the step times from the run itself, and everything else from the other four at the pace that
those step times show.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazarus.record.events import Event, read_events
from lazarus.simulate.inputs.costs import Costs
from lazarus.simulate.rows import FleetPolicy, Row
from lazarus.simulate.studies.calibrate import as_setting, calibrated, measured
from lazarus.simulate.systems.policies import run_one

Record = Sequence[Event]

MODEL = (
    "cluster.launcher=process", "metrics.progress=off", "model.layers=4", "model.dim=64",
    "model.heads=4", "model.seq_len=64", "model.vocab=256", "model.experts=8", "model.top_k=2",
    "model.moe_every=2", "train.global_batch=16", "train.micro_batch_size=4",
    "placement.slots_per_node=8", "checkpoint.every=0", "checkpoint.full_at_end=false",
    "cluster.join_debounce_s=0.2",
)  # fmt: skip
# Nodes, steps and faults. Sizes and schedules all differ; each run has several recoveries, since
# one alone says more of its moment than of the fleet.
CASES: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("4 nodes, kill and join", 4, 230, (
        "kill:1@30/backward", "join@45", "kill:2@85/dispatch", "join@100", "kill:4@140/grad_sync",
        "join@155", "kill:0@195/forward")),
    ("5 nodes, spread out", 5, 200, (
        "kill:0@40/dispatch", "kill:3@80/commit", "join@110", "kill:4@160/forward")),
    ("6 nodes, two at once", 6, 170, (
        "kill:2@40/combine", "kill:5@40/combine", "kill:0@105/data", "kill:1@105/data")),
    ("7 nodes, in bursts", 7, 170, (
        "kill:6@30/optimizer", "kill:2@42/backward", "kill:0@54/combine", "kill:5@125/data",
        "kill:1@137/grad_sync")),
    ("8 nodes, steady", 8, 170, (
        "kill:7@25/backward", "kill:1@48/grad_sync", "kill:4@71/optimizer", "kill:0@94/forward",
        "kill:5@117/dispatch", "kill:2@140/commit")),
)  # fmt: skip


def train(folder: Path, nodes: int, steps: int, faults: Sequence[str]) -> None:
    """One real run in a process of its own."""
    code = (
        "import json, sys\n"
        "from lazarus import ElasticTrainer, TrainConfig\n"
        "if __name__ == '__main__':\n"
        "    overrides, faults = json.loads(sys.argv[1])\n"
        "    ElasticTrainer(TrainConfig.load(overrides=overrides), faults=faults).fit()\n"
    )
    script = folder.with_suffix(".py")
    script.write_text(code)
    overrides = [*MODEL, f"cluster.nodes={nodes}", f"train.steps={steps}", f"run.dir={folder}"]
    subprocess.run(
        [sys.executable, str(script), json.dumps([overrides, list(faults)])],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def pace(own: Costs, others: Costs) -> float:
    """How much longer steps of the same sizes took than in the other runs; 1 without such."""
    theirs = dict(others.step_table_s)
    ratios = [seconds / theirs[nodes] for nodes, seconds in own.step_table_s if nodes in theirs]
    return statistics.median(ratios) if ratios else 1.0


def predict(records: Mapping[str, Sequence[Record]], name: str) -> dict[str, Any]:
    """One case beside its predictions: medians over its rounds.

    Args:
        records: What each case's runs left, one a round.
        name: The case to predict, from the others.
    """
    mine = records[name]
    guesses: dict[str, list[Row]] = {"others": [], "own_steps": []}
    for number, events in enumerate(mine):
        own = calibrated([events])
        others = calibrated([rounds[number] for case, rounds in records.items() if case != name])
        paced = others.at_pace(pace(own, others))
        known = {nodes for nodes, _ in own.step_table_s}
        steps = (*own.step_table_s, *(p for p in paced.step_table_s if p[0] not in known))
        for label, costs in (("others", others), ("own_steps", paced.with_steps(steps))):
            setting = as_setting(events, costs, name=name)
            guesses[label].append(run_one(setting, FleetPolicy(name="lazarus"), seed=0))
    real = [measured(events) for events in mine]
    goodput = statistics.median(one.goodput_tokens_per_s for one in real)
    recovery_s = statistics.median(one.recovery_median_s for one in real)
    row: dict[str, Any] = {
        "run": name,
        "rounds": len(real),
        "recoveries": sum(one.recoveries for one in real),
        "goodput": goodput,
        "goodputs": [one.goodput_tokens_per_s for one in real],
        "recovery_s": recovery_s,
        "recoveries_s": [one.recovery_median_s for one in real],
    }
    for label, said in guesses.items():
        pairs = list(zip(said, real, strict=True))
        goodputs = [s.goodput_tokens_per_s / r.goodput_tokens_per_s - 1 for s, r in pairs]
        recoveries = [s.recovery_median_s / r.recovery_median_s - 1 for s, r in pairs]
        row[f"goodput_{label}"] = statistics.median(s.goodput_tokens_per_s for s in said)
        row[f"recovery_s_{label}"] = statistics.median(s.recovery_median_s for s in said)
        row[f"goodput_error_{label}"] = statistics.median(goodputs)
        row[f"recovery_error_{label}"] = statistics.median(recoveries)
        row[f"errors_{label}"] = {"goodput": goodputs, "recovery": recoveries}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only three cases, one round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all cases (default: 5)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", metavar="DIR", help="where the runs stay; reused if there")
    args = parser.parse_args()
    cases = CASES[: 3 if args.quick else None]
    records: dict[str, list[Record]] = {name: [] for name, *_ in cases}
    with tempfile.TemporaryDirectory(prefix="simulated-") as scratch:
        for number in range(1 if args.quick else args.rounds):
            home = Path(args.keep or scratch) / f"round{number}"
            home.mkdir(parents=True, exist_ok=True)
            for index, (name, nodes, steps, faults) in enumerate(cases):
                folder = home / f"run{index}"
                if not (folder / "events.jsonl").exists():
                    print(f"round {number}: {name} ...", file=sys.stderr, flush=True)
                    train(folder, nodes, steps, faults)
                records[name].append(read_events(folder))
    rows = [predict(records, name) for name in records]
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"schema": 1, "rows": rows}, indent=2) + "\n")
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Real, predicted and error; errors beyond 10 % are marked."""
    lines = [f"{'run':24} {'tok/s real':>10} {'others':>8} {'err':>7} {'own st.':>8} {'err':>7} "
             f"{'rec. s':>7} {'others':>7} {'err':>7} {'own st.':>7} {'err':>7}"]  # fmt: skip
    for row in rows:
        cells = [f"{row['run']:24} {row['goodput']:10.0f}"]
        for key in ("others", "own_steps"):
            cells.append(f"{row[f'goodput_{key}']:8.0f} {_error(row[f'goodput_error_{key}'])}")
        cells.append(f"{row['recovery_s']:7.3f}")
        for key in ("others", "own_steps"):
            cells.append(
                f"{row[f'recovery_s_{key}']:7.3f} {_error(row.get(f'recovery_error_{key}', 0.0))}"
            )
        lines.append(" ".join(cells))
    for what in ("goodput", "recovery"):
        for label, said in (("others", "from the others alone"), ("own_steps", "own step times")):
            errors = [abs(r.get(f"{what}_error_{label}", 0.0)) for r in rows]
            middle, worst = statistics.median(errors), max(errors)
            lines.append(f"{what}: median error {middle:.1%}, worst {worst:.1%}, {said}")
    return "\n".join(lines)


def _error(value: float) -> str:
    return f"{value:+6.1%}{'!' if abs(value) > 0.1 else ' '}"


if __name__ == "__main__":
    sys.exit(main())

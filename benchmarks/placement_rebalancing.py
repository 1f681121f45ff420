"""When to rebalance? Accumulated regret against fixed intervals, over the whole routing trace.

    python benchmarks/placement_rebalancing.py [--quick] [--json FILE]

Step time over the ideal: 1 + moe_part * (max/mean - 1), shares renewed every 10 steps from smoothed
loads, plus the time of each move. The best fixed interval is chosen in hindsight.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from placement_quality import most_loaded, trace

from placement import PlacementRequest, Plan, plan, replan
from placement.balance.shares import balance_of
from placement.migration.migrate import busiest, transfers
from placement.rebalance import MoveCost, Regret, considered

MOE_PART = 0.6
SMOOTHING = 0.8  # weight of the average so far in the next one
EVERY = 10  # steps per record of the trace
LEVELS = {"cheap": 0.2, "as measured": 1.0, "dear": 5.0}
INTERVALS = (1, 2, 5, 10, 20, 50, 100)
ALPHAS = (0.5, 0.75, 1.0)

Rule = Callable[[np.ndarray, int, PlacementRequest, Plan, MoveCost], Plan | None]


def ask(load: np.ndarray) -> PlacementRequest:
    """A request for the bench's cluster."""
    return PlacementRequest(load=load, num_nodes=10, slots_per_node=6)


@dataclass(frozen=True)
class Life:
    """What one rule did over the trace, before moves are priced.

    Attributes:
        excess: Step time over the ideal without moves, mean.
        moves: Moves made.
        received: Replicas into the busiest rank, summed over the moves.
        replicas: Replicas moved in all.
        steps: Length of the trace.
    """

    excess: float
    moves: int
    received: int
    replicas: int
    steps: int

    def step_time(self, cost: MoveCost) -> float:
        """Mean step time over the ideal, moves included."""
        spent = cost.fixed * self.moves + cost.per_replica * self.received
        return 1.0 + self.excess + spent / self.steps


def run(load: np.ndarray, rule: Rule, cost: MoveCost) -> Life:
    """One rule over the whole trace; ``cost`` is what the rule believes a move costs."""
    current = plan(ask(load[0]))
    smooth: np.ndarray | None = None
    moves = received = replicas = 0
    excess = 0.0
    for record in range(1, len(load)):
        newest = load[record - 1]
        smooth = newest if smooth is None else SMOOTHING * smooth + (1.0 - SMOOTHING) * newest
        then = rule(load[record - 1], record, ask(smooth), current, cost)
        if then is not None:
            todo = transfers(current, then)
            if todo:
                received += busiest(todo)[1]
                moves += 1
                replicas += len(todo)
            current = then
        ratio = balance_of(load[record], current.node_member, share_load=smooth).mean()
        excess += MOE_PART * (float(ratio) - 1.0)
    records = len(load) - 1
    return Life(excess / records, moves, received, replicas, EVERY * records)


def fixed(interval: int) -> Rule:
    """Rebalance in place every ``interval`` records."""

    def rule(
        latest: np.ndarray, record: int, request: PlacementRequest, now: Plan, cost: MoveCost
    ) -> Plan | None:
        return replan(request, previous=now, rebalance=True) if record % interval == 0 else None

    return rule


def by_regret(alpha: float) -> Rule:
    """Rebalance in place when the regret has paid for it."""
    state = Regret()

    def rule(
        latest: np.ndarray, record: int, request: PlacementRequest, now: Plan, cost: MoveCost
    ) -> Plan | None:
        nonlocal state
        state, then = considered(
            state,
            request,
            previous=now,
            steps=EVERY,
            cost=cost,
            moe_part=MOE_PART,
            alpha=alpha,
            latest=latest,
        )
        return then

    return rule


def never(
    latest: np.ndarray, record: int, request: PlacementRequest, now: Plan, cost: MoveCost
) -> Plan | None:
    """Keep the first plan."""
    return None


def lived(load: np.ndarray, job: tuple[str, float, float]) -> Life:
    """One job of the table: never, a fixed interval in records, or regret with its alpha."""
    kind, value, factor = job
    cost = MoveCost(fixed=0.1 * factor, per_replica=0.1 * factor)
    if kind == "never":
        return run(load, never, cost)
    return run(load, fixed(int(value)) if kind == "every" else by_regret(value), cost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, raw, name = trace()
    load = most_loaded(raw, 16)[: 121 if args.quick else 501, : 4 if args.quick else 12]
    print(f"{name}: {len(load) * EVERY} steps, {load.shape[1]} layers; step time over the ideal")
    # What a fixed interval does depends on no cost; what regret does, on its own.
    jobs = [("never", 0.0, 1.0)] + [("every", float(i), 1.0) for i in INTERVALS]
    jobs += [("regret", a, factor) for factor in LEVELS.values() for a in ALPHAS]
    with ProcessPoolExecutor(args.jobs) as pool:
        lives = dict(zip(jobs, pool.map(lived, [load] * len(jobs), jobs), strict=True))
    tables: dict[str, Any] = {}
    for level, factor in LEVELS.items():
        cost = MoveCost(fixed=0.1 * factor, per_replica=0.1 * factor)
        rows = {_label(j): life for j, life in lives.items() if j[0] != "regret" or j[2] == factor}
        best = min(life.step_time(cost) for j, life in lives.items() if j[0] != "regret")
        print(f"\ncost {level}: {cost.fixed:.2f} + {cost.per_replica:.2f} per replica, in steps")
        for label, life in rows.items():
            over = (life.step_time(cost) / best - 1) * 100
            print(f"  {label:<12}{life.step_time(cost):>9.4f}  {life.moves:>4} moves "
                  f"{life.replicas:>6} replicas   {over:+.2f} % over the best fixed")  # fmt: skip
        tables[level] = {k: [v.step_time(cost), v.moves, v.replicas] for k, v in rows.items()}
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "levels": tables}, indent=1))
    return 0


def _label(job: tuple[str, float, float]) -> str:
    kind, value, _ = job
    return {"never": "never", "every": f"every {int(value) * EVERY}"}.get(kind, f"regret {value}")


if __name__ == "__main__":
    sys.exit(main())

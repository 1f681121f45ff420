"""With a device per rank the busiest rank sets the pace: how many rows has it, by split?

Replays a routing trace (SmartMoE's, when it is there; else a drifting Zipf load) through the real
integer splits at 10 to 64 ranks. Plans are ``--age`` iterations old, as in a run that rebalances
now and then. For every split: rows of the busiest rank over the mean, bytes of gradients between
replicas, and the step time that the stated cost model predicts. No timing is involved, so a loaded
machine gives the same figures; only "ms a split" is a time.

Cost model, per layer and step: busiest rows x 6 FLOP x parameters of an expert / F
+ 4 crossings x row bytes x busiest rank's rows from elsewhere / B + busiest sender's gradient
bytes / B. Forward and backward, bf16 rows, fp32 gradients; a collective starts for nothing.

Run: python benchmarks/balance_rows.py [--quick] [--json FILE] [--trace FILE.npz]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dispatcher.reference import gradients_sent
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import SplitRule, split_counts
from placement import PlacementRequest, plan

TRACE = Path(__file__).parents[2] / "shared/data/expert-load/smartmoe-expert-load.npz"
SLOTS = {10: 8, 16: 5, 32: 3, 64: 2}  # a floor of two replicas and a little more


@dataclass(frozen=True)
class Costs:
    """A device and a model: OLMoE's expert on something like an H100 with 400 Gbit/s."""

    dim: int = 2048
    hidden: int = 1024
    flops: float = 160e12
    bytes_per_s: float = 50e9

    @property
    def parameters(self) -> int:
        return 3 * self.dim * self.hidden

    @property
    def rows_per_replica(self) -> float:
        """Rows whose arithmetic takes as long as sending one expert's fp32 gradient."""
        return (4 * self.parameters / self.bytes_per_s) / (6 * self.parameters / self.flops)

    def step_s(self, *, rows: int, foreign: int, gradient_bytes: float) -> float:
        arithmetic = 6.0 * self.parameters * rows / self.flops
        crossing = 4 * 2.0 * self.dim * foreign / self.bytes_per_s
        return arithmetic + crossing + gradient_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Outcome:
    """One layer of one iteration under one split."""

    skew: float  # busiest rank's rows over the mean
    gradient_bytes: float  # of the busiest sender
    step_s: float
    split_s: float


def load_trace(path: Path, *, quick: bool) -> tuple[np.ndarray, str]:
    """Copies per [iteration, layer, expert], and where they come from."""
    if path.exists():
        return np.load(path)["load"], f"trace {path.name}"
    random = np.random.default_rng(0)
    walk = np.cumsum(random.normal(0, 0.05, (501, 4 if quick else 24, 32)), axis=0)
    weight = np.exp(1.2 * walk) / (1 + np.arange(32)) ** 1.2
    shares = weight / weight.sum(-1, keepdims=True)
    return np.floor(shares * 262_144).astype(np.int64), "a drifting Zipf load (no trace here)"


def spread_over_ranks(total_E: np.ndarray, ranks: int, seed: int) -> np.ndarray:
    """Copies that each rank routes to each expert: near-equal parts, [R, E]."""
    counts = np.tile(total_E // ranks, (ranks, 1))
    random = np.random.default_rng(seed)
    for expert, rest in enumerate(total_E % ranks):
        counts[random.permutation(ranks)[:rest], expert] += 1
    return counts


def eplb_like(load_E: np.ndarray, ranks: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Replicate the largest load per replica, pack the largest first on the least loaded rank.

    Knows no floor and no nodes; replicas of an expert share its tokens equally.

    Returns:
        expert_of_slot [R, S] and shares [E, R].
    """
    experts = load_E.size
    replicas = np.ones(experts, dtype=np.int64)
    for _ in range(ranks * slots - experts):
        free = np.where(replicas < ranks, load_E / replicas, -1.0)
        replicas[int(free.argmax())] += 1
    items = sorted(
        ((load_E[e] / replicas[e], e) for e in range(experts) for _ in range(replicas[e])),
        key=lambda item: (-item[0], item[1]),
    )
    table = np.full((ranks, slots), -1)
    used, weight = np.zeros(ranks, dtype=np.int64), np.zeros(ranks)
    for value, expert in items:
        fits = [r for r in range(ranks) if used[r] < slots and expert not in table[r]]
        if fits:  # an item that fits nowhere any more is one replica less
            rank = min(fits, key=lambda r: (weight[r], r))
            table[rank, used[rank]] = expert
            used[rank] += 1
            weight[rank] += value
    holds = np.array([[(table[r] == e).any() for r in range(ranks)] for e in range(experts)])
    return table, holds / holds.sum(1, keepdims=True)


def plain_ep(experts: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts dealt out in order; more ranks than experts repeat the deal."""
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for i in range(max(experts, ranks)):
        rows[i % ranks].append(i % experts)
    width = max(map(len, rows))
    table = np.array([row + [-1] * (width - len(row)) for row in rows])
    holds = np.array([[(table[r] == e).any() for r in range(ranks)] for e in range(experts)])
    return table, holds / holds.sum(1, keepdims=True)


def outcome(
    counts: np.ndarray, tables: list[RoutingTable], rule: SplitRule, costs: Costs
) -> Outcome:
    """The split's figures for all ranks, from the split as each rank would compute it."""
    begin = time.perf_counter()
    first = split_counts(counts, tables[0], rule)
    split_s = time.perf_counter() - begin
    rows_R = first.rows_ER.sum(0)
    busiest = int(rows_R.argmax())
    mine = split_counts(counts, tables[busiest], rule)
    foreign = int(mine.recv_IE.sum() - mine.recv_IE[busiest].sum())
    sent_R = 4.0 * costs.parameters * gradients_sent(first.served_ER, tables[0])
    return Outcome(
        skew=float(rows_R.max() / rows_R.mean()),
        gradient_bytes=float(sent_R.max()),
        step_s=costs.step_s(
            rows=int(rows_R.max()), foreign=foreign, gradient_bytes=float(sent_R.max())
        ),
        split_s=split_s,
    )


def contestants(
    old_LE: np.ndarray, ranks: int, costs: Costs
) -> Callable[[int], list[tuple[str, list[RoutingTable], SplitRule]]]:
    """For a layer: name, tables of all ranks and rule of every split, planned from ``old_LE``."""
    slots = SLOTS[ranks]
    ours = plan(PlacementRequest(load=old_LE, num_nodes=ranks, slots_per_node=slots))
    price = SplitRule(mode="balanced", rows_per_replica=costs.rows_per_replica)

    def of(layer: int) -> list[tuple[str, list[RoutingTable], SplitRule]]:
        def tables(slots_RS: np.ndarray, shares: np.ndarray, home: object) -> list[RoutingTable]:
            one = RoutingTable.from_plan_arrays(slots_RS, shares, rank=0, home_E=home)
            return [_for_rank(one, r) for r in range(ranks)]

        planned = tables(ours.expert_of_slot[layer], ours.shares[layer], ours.home[layer])
        eplb = tables(*eplb_like(old_LE[layer].astype(float), ranks, slots), None)
        plain = tables(*plain_ep(old_LE.shape[1], ranks), None)
        return [
            ("home", planned, SplitRule(mode="home")),
            ("Algorithm 1, plan's shares", planned, SplitRule(mode="shares")),
            ("balanced by cost", planned, price),
            ("balanced, traffic free", planned, SplitRule(mode="balanced")),
            ("EPLB-like", eplb, SplitRule(mode="shares")),
            ("plain EP", plain, SplitRule(mode="shares")),
        ]

    return of


def _for_rank(table: RoutingTable, rank: int) -> RoutingTable:
    return RoutingTable(
        rank=rank, generation=0, expert_of_slot_RS=table.expert_of_slot_RS,
        holds_ER=table.holds_ER, shares_ER=table.shares_ER, home_E=table.home_E,
    )  # fmt: skip


def replay(
    load: np.ndarray, ranks: int, iterations: list[int], age: int, costs: Costs
) -> dict[str, list[Outcome]]:
    """All splits over all layers of the given iterations."""
    found: dict[str, list[Outcome]] = {}
    for iteration in iterations:
        of = contestants(load[max(iteration - age, 0)], ranks, costs)
        for layer in range(load.shape[1]):
            counts = spread_over_ranks(load[iteration, layer], ranks, seed=iteration)
            for name, tables, rule in of(layer):
                found.setdefault(name, []).append(outcome(counts, tables, rule, costs))
    return found


def show(ranks: int, found: dict[str, list[Outcome]]) -> list[dict[str, float | str]]:
    print(f"\n{ranks} ranks x {SLOTS[ranks]} slots")
    rows: list[dict[str, float | str]] = []
    best = min(statistics.fmean(o.step_s for o in outcomes) for outcomes in found.values())
    for name, outcomes in found.items():
        skews = sorted(o.skew for o in outcomes)
        step_s = statistics.fmean(o.step_s for o in outcomes)
        row = {
            "ranks": ranks, "split": name, "skew_mean": statistics.fmean(skews),
            "skew_p95": skews[int(0.95 * (len(skews) - 1))],
            "gradient_mb": statistics.fmean(o.gradient_bytes for o in outcomes) / 1e6,
            "layer_ms": 1e3 * step_s, "split_ms": 1e3 * statistics.median(
                o.split_s for o in outcomes),
        }  # fmt: skip
        rows.append(row)
        print(
            f"  {name:28s} busiest/mean {row['skew_mean']:.3f} (p95 {row['skew_p95']:.3f})  "
            f"gradients {row['gradient_mb']:7.1f} MB  predicted {row['layer_ms']:7.3f} ms a layer "
            f"({step_s / best:.2f}x)  {row['split_ms']:.2f} ms a split"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one iteration, 10 and 64 ranks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--age", type=int, default=20, help="plans are this many entries old")
    args = parser.parse_args()
    load, origin = load_trace(args.trace, quick=args.quick)
    iterations = [400] if args.quick else [60, 120, 200, 280, 360, 440, 500]
    costs = Costs()
    print(
        f"{origin}, {load.shape[1]} layers x {load.shape[2]} experts, iterations {iterations}, "
        f"plans {args.age} entries old; expert {costs.dim} x {costs.hidden} SwiGLU, "
        f"{costs.flops / 1e12:.0f} TFLOP/s, {costs.bytes_per_s / 1e9:.0f} GB/s, "
        f"one more replica = {costs.rows_per_replica:.0f} rows"
    )
    rows: list[dict[str, float | str]] = []
    for ranks in (10, 64) if args.quick else SLOTS:
        rows += show(ranks, replay(load, ranks, iterations, args.age, costs))
    if args.json:
        args.json.write_text(json.dumps({"origin": origin, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

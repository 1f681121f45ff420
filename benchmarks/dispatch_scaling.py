"""How does the expert path scale: with ranks at equal total work, with tokens, experts and width?

One MoE layer, forward and backward, GELU experts, fp32. Ranks share one machine, so at equal total
work the ideal is a constant CPU time; wall time cannot fall below one process with all cores.
Then growth: each doubling of tokens, experts or width beside what its arithmetic predicts. And the
peak memory of the exchange: the largest sum of live row buffers over the routed copies' bytes.

Run: python benchmarks/dispatch_scaling.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dispatcher import (
    Exchange,
    ExpertLayout,
    PathOptions,
    RoutingTable,
    expert_path,
    route,
    shared_zeros,
    slots_for_exchange,
    sum_replica_gradients,
    within_machine,
)
from dispatcher.memory import keep_freed_memory
from dispatcher.processes import run_processes


@dataclass(frozen=True)
class Work:
    """One layer's work in all, whoever shares it."""

    tokens: int = 2048
    experts: int = 8
    top_k: int = 2
    dim: int = 256
    replicas: int = 2
    hidden: int = 0  # 0: four times the width

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(
            activation="gelu", dim=self.dim, hidden=self.hidden or 4 * self.dim, bias=True
        )


def layer_step(exchange: Exchange, work: Work) -> Callable[[], int]:
    """A function that runs forward, backward and the replicas' gradients of one layer once.

    It returns the copies that this rank sent or received, whichever are more.
    """
    replicas = min(work.replicas, exchange.size)
    rows: list[list[int]] = [[] for _ in range(exchange.size)]
    for expert in range(work.experts):
        for i in range(replicas):
            rows[(expert + i) % exchange.size].append(expert)
    width = max(map(len, rows))
    table = RoutingTable.from_plan_arrays(
        [row + [-1] * (width - len(row)) for row in rows], rank=exchange.rank
    )
    order = slots_for_exchange(table)
    random = torch.Generator().manual_seed(exchange.rank)
    own = work.tokens // exchange.size
    x = torch.randn(own, work.dim, generator=random, requires_grad=True)
    score = torch.rand(own, work.experts, generator=random)
    gate, choice = score.topk(min(work.top_k, work.experts))
    gate = gate.clone().requires_grad_()
    weight = torch.randn(width, work.layout.row_numel, generator=random) / work.dim
    weight.requires_grad_()
    weight.grad = shared_zeros(weight.shape)
    upstream = torch.ones(own, work.dim)

    def once() -> int:
        x.grad = gate.grad = None
        written: set[int] = set()
        routed = route(x, choice, table=table, exchange=exchange, expert_of_slot=order)
        y = expert_path(x, gate, weight, routed, PathOptions(layout=work.layout), written=written)
        y.backward(upstream)
        assert weight.grad is not None
        sum_replica_gradients(
            weight.grad, table, exchange, served_ER=routed.split.served_ER,
            expert_of_slot=order, written=written,
        )  # fmt: skip
        return max(routed.num_sent, routed.num_received)

    return once


def measure(exchange: Exchange, work: Work, repeats: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of ``repeats`` steps on one rank."""
    keep_freed_memory()
    exchange = within_machine(exchange)
    once = layer_step(exchange, work)
    once()
    wall, core = [], []
    for _ in range(repeats):
        exchange.all_reduce(torch.zeros(1), label="digest")
        begin, cpu = time.perf_counter(), time.process_time()
        once()
        wall.append(time.perf_counter() - begin)
        core.append(time.process_time() - cpu)
    return wall, core


def timed(work: Work, *, ranks: int, repeats: int, threads: int = 1) -> dict[str, Any]:
    """Median wall of the slowest rank and CPU time of all ranks, ms."""
    found = run_processes(measure, size=ranks, args=(work, repeats), threads=threads)
    wall = sorted(max(step) for step in zip(*(f[0] for f in found), strict=True))
    core = sorted(sum(step) for step in zip(*(f[1] for f in found), strict=True))
    return {
        "ranks": ranks, "work": asdict(work), "wall_ms": 1e3 * statistics.median(wall),
        "wall_spread_ms": (1e3 * wall[0], 1e3 * wall[-1]),
        "cpu_ms": 1e3 * statistics.median(core), "cpu_spread_ms": (1e3 * core[0], 1e3 * core[-1]),
    }  # fmt: skip


def peak_ratio(exchange: Exchange, work: Work) -> float:
    """Peak of all memory above what was there, over the bytes of this rank's routed copies.

    The output is the caller's and does not count; hidden activations belong to the experts, not to
    the exchange, and are made negligible.
    """
    once = layer_step(exchange, work)
    once()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as watch:
        copies = once() * work.dim * 4
    live = peak = 0
    for event in watch.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    output = work.tokens // exchange.size * work.dim * 4
    return (peak - output) / copies


def growth(base: Work, *, ranks: int, repeats: int, doublings: int) -> list[dict[str, Any]]:
    """CPU time as one of tokens, experts, width doubles, beside the arithmetic's growth."""
    rows = []
    for name, factor in (("tokens", 2.0), ("experts", 1.0), ("dim", 4.0)):
        before: dict[str, Any] | None = None
        for i in range(doublings + 1):
            work = replace(base, **{name: getattr(base, name) << i})
            row = timed(work, ranks=ranks, repeats=repeats)
            row["axis"], row["arithmetic"] = name, factor
            row["growth"] = row["cpu_ms"] / before["cpu_ms"] if before else None
            before = row
            rows.append(row)
            grew = f"{row['growth']:.2f}x for {factor:.0f}x" if row["growth"] else ""
            print(
                f"  {name:8s} {getattr(work, name):6d}  cpu {row['cpu_ms']:8.1f} ms  "
                f"wall {row['wall_ms']:8.1f} ms  {grew}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer ranks and repeats")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    work, repeats = Work(), 5 if args.quick else 15
    cores = os.cpu_count() or 1
    print(
        f"one MoE layer, {work}, forward + backward + replica gradients, fp32, {cores} cores, load "
        f"{os.getloadavg()[0]:.1f}, median of {repeats}"
    )
    alone = timed(work, ranks=1, repeats=repeats, threads=cores)
    print(
        f"one process, {cores} threads: wall {alone['wall_ms']:.1f} ms, cpu {alone['cpu_ms']:.1f}"
    )
    rows = []
    for ranks in (1, 2, 4) if args.quick else (1, 2, 3, 4, 6, 8):
        row = timed(work, ranks=ranks, repeats=repeats)
        rows.append(row)
        low, high = row["cpu_spread_ms"]
        print(
            f"  {ranks} ranks  wall {row['wall_ms']:7.1f} ms "
            f"({row['wall_ms'] / alone['wall_ms']:.2f}x one process)  "
            f"cpu {row['cpu_ms']:7.1f} ms [{low:.0f}-{high:.0f}] "
            f"({row['cpu_ms'] / rows[0]['cpu_ms']:.2f}x one rank)"
        )
    grown = growth(work, ranks=2, repeats=repeats, doublings=1 if args.quick else 2)
    thin = Work(tokens=16384, hidden=16, dim=512)
    peaks = run_processes(peak_ratio, size=4, args=(thin,))
    print(f"peak memory of a step / routed copies, 4 ranks: {np.round(peaks, 2).tolist()}")
    if args.json:
        args.json.write_text(
            json.dumps({"alone": alone, "ranks": rows, "growth": grown, "peaks": peaks}, indent=1)
        )


if __name__ == "__main__":
    main()

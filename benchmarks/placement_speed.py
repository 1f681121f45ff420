"""How long does a plan take, and how does that grow?

    python benchmarks/placement_speed.py [--quick] [--json FILE]

Each row: median and fastest of several runs (wall and CPU time of this process), certificate
included, and the peak of traced memory. The baseline of the same run is the paper's MRO, layer by
layer. A loop of plain Python is timed beside it: divide by it to compare machines, or a busy one
with an idle one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from placement import PlacementRequest, certificate, plan, replan
from placement.assignment.baselines import baseline


def loads(layers: int, experts: int, power: float = 1.0) -> np.ndarray:
    """Zipf loads, shuffled in each layer."""
    rng = np.random.default_rng(0)
    row = np.arange(1, experts + 1) ** -power
    return np.stack([rng.permutation(row) for _ in range(layers)]) * 1e5


def timed(work: Callable[[], Any], runs: int) -> dict[str, float]:
    """Milliseconds of several runs."""
    wall, cpu = [], []
    for _ in range(runs):
        a, b = time.perf_counter(), time.process_time()
        work()
        wall.append((time.perf_counter() - a) * 1e3)
        cpu.append((time.process_time() - b) * 1e3)
    return {
        "median_ms": statistics.median(wall),
        "fastest_ms": min(wall),
        "slowest_ms": max(wall),
        "cpu_fastest_ms": min(cpu),
    }


def reference_loop() -> None:
    """A million additions."""
    total = 0
    for i in range(1_000_000):
        total += i


def peak_mib(work: Callable[[], Any]) -> float:
    """Peak of traced memory, MiB."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def case(layers: int, experts: int, nodes: int, slots: int, runs: int) -> dict[str, Any]:
    """Plan with certificate, and the replan after one loss."""
    load = loads(layers, experts)
    request = PlacementRequest(load=load, num_nodes=nodes, slots_per_node=slots)
    losses = min(nodes, 64)

    def whole() -> None:
        certificate(plan(request), load=load, max_losses=losses)

    whole()  # imports and tables that a process makes once
    made = plan(request)
    after = PlacementRequest(
        load=load,
        num_nodes=nodes - 1,
        slots_per_node=slots,
        node_ids=tuple(n for n in range(nodes) if n != nodes // 2),
    )
    lost = frozenset({nodes // 2})
    row: dict[str, Any] = {"layers": layers, "experts": experts, "nodes": nodes, "slots": slots}
    row["plan"] = timed(whole, runs)
    row["replan"] = timed(lambda: replan(after, previous=made, lost=lost), runs)
    row["peak_mib"] = peak_mib(whole)
    found = certificate(made, load=load, max_losses=losses)
    row["max_over_mean"], row["method"] = found.max_over_mean, found.method
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = 7 if args.quick else 25
    shapes = [(12, 16, 10, 6), (58, 256, 1024, 8)]
    if not args.quick:
        shapes += [(12, 16, n, 6) for n in (8, 16, 32, 64, 128, 256)]
        shapes += [(12, e, 64, e // 8) for e in (32, 64, 128, 256)]
        shapes += [(layers, 16, 10, 6) for layers in (1, 4, 24, 48, 96)]
    before = timed(reference_loop, 5)
    rows = []
    print(f"{'L':>4}{'E':>5}{'N':>6}{'c':>4}  {'plan + certificate ms: median':>30}{'fastest':>9}"
          f"{'cpu':>9}{'replan ms':>11}{'fastest':>9}{'MiB':>7}  max/mean")  # fmt: skip
    for layers, experts, nodes, slots in shapes:
        large = layers * experts * nodes > 1e6
        row = case(layers, experts, nodes, slots, max(3, runs // 5) if large else runs)
        rows.append(row)
        a, b = row["plan"], row["replan"]
        print(f"{layers:>4}{experts:>5}{nodes:>6}{slots:>4}  {a['median_ms']:>30.2f}"
              f"{a['fastest_ms']:>9.2f}{a['cpu_fastest_ms']:>9.2f}{b['median_ms']:>11.2f}"
              f"{b['fastest_ms']:>9.2f}{row['peak_mib']:>7.1f}  {row['max_over_mean']:.4f}"
              f"  {row['method']}", flush=True)  # fmt: skip
    request = PlacementRequest(load=loads(12, 16), num_nodes=10, slots_per_node=6)
    mro = timed(lambda: baseline("mro", request), runs)
    after = timed(reference_loop, 5)
    print(f"baseline: MRO as printed, 12 x 16 x 10: median {mro['median_ms']:.2f} ms")
    loop = min(before["cpu_fastest_ms"], after["cpu_fastest_ms"])
    print(f"reference loop {loop:.0f} ms CPU (fastest of ten; slower than on an idle core: busy)")
    if args.json:
        args.json.write_text(
            json.dumps({"schema": 1, "rows": rows, "mro": mro, "reference_loop_ms": loop}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

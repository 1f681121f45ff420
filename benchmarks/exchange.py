"""How fast are the exchanges between ranks of one machine: shared memory against gloo?

The collectives that a step of dispatch_vs_peers.py makes, each in a loop, the two exchanges in
turns: wall of the slowest rank and CPU time of all ranks over the cores, ms a call.

Run: python benchmarks/exchange.py [--ranks 4]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from dispatcher import Exchange, within_machine
from dispatcher.memory import keep_freed_memory
from dispatcher.processes import run_processes

MIB = 1 << 18  # floats


def calls(size: int) -> dict[str, Callable[[Exchange], None]]:
    """A step's collectives by name."""
    small, large = torch.zeros(size, 9, dtype=torch.int32), torch.ones(int(2.3 * MIB * 4))
    rows, got = torch.ones(512, 256), torch.empty(512, 256)
    even = [512 // size] * size
    grad, into = torch.ones(8 * MIB), torch.empty(8 * MIB)

    def to_next(via: Exchange) -> None:
        out, back = [0] * size, [0] * size
        out[(via.rank + 1) % size] = back[(via.rank - 1) % size] = 8 * MIB
        via.all_to_all(into, grad, output_splits=back, input_splits=out, label="replica_grad")

    return {
        "counts, sum of [ranks, 9] int32": lambda via: via.all_reduce(small, label="counts"),
        "tokens, 512 KiB to all": lambda via: via.all_to_all(
            got, rows, output_splits=even, input_splits=even, label="dispatch"
        ),
        "replicas, 8 MiB to one": to_next,
        "dense, sum of 9.2 MiB": lambda via: via.all_reduce(large, label="dense_grad"),
    }


def measure(gloo: Exchange, blocks: int) -> dict[str, list[tuple[float, float]]]:
    keep_freed_memory()
    both = {"gloo": gloo, "shared memory": within_machine(gloo)}
    found: dict[str, list[tuple[float, float]]] = {}
    for what, call in calls(gloo.size).items():
        repeats = 200 if "counts" in what else 20
        for block in range(blocks + 1):
            for name, via in both.items():
                gloo.all_reduce(torch.zeros(1), label="digest")
                wall, core = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    call(via)
                spent = (time.perf_counter() - wall) / repeats, time.process_time() - core
                if block:
                    pair = (spent[0], spent[1] / repeats)
                    found.setdefault(f"{what} | {name}", []).append(pair)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=7)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    print(f"{args.ranks} ranks, {cores} cores, load {os.getloadavg()[0]:.1f}, {args.blocks} blocks")
    by_rank = run_processes(measure, size=args.ranks, args=(args.blocks,))
    for name in by_rank[0]:
        wall = [
            1e3 * max(b[0] for b in row) for row in zip(*(r[name] for r in by_rank), strict=True)
        ]
        core = [
            1e3 * sum(b[1] for b in row) / cores
            for row in zip(*(r[name] for r in by_rank), strict=True)
        ]
        print(
            f"  {name:50s} wall {statistics.median(wall):7.2f} [{min(wall):.2f}-{max(wall):.2f}]  "
            f"core {statistics.median(core):7.2f}"
        )


if __name__ == "__main__":
    main()

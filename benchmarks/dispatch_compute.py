"""One matrix product per group, or torch's grouped_mm: which is faster for the experts?

Products of the same rows and weights, forward (x @ w) and weight gradients (x^T @ g), the two ways
interleaved; CPU time of one thread, so that a loaded machine disturbs little. Ratio above 1: the
loop that the dispatcher uses is faster.

Run: python benchmarks/dispatch_compute.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [(2, 256, 256, 1024), (8, 64, 256, 1024), (64, 16, 256, 512), (4, 256, 768, 3072)]


def groups(count: int, rows: int) -> tuple[list[int], Tensor]:
    """Uneven heights around ``rows``, the same every time, and their running sum."""
    heights = [max(1, rows + (rows // 2) * (1 if i % 2 else -1)) for i in range(count)]
    return heights, torch.tensor(heights).cumsum(0).to(torch.int32)


def ways(
    count: int, rows: int, dim: int, hidden: int, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """For forward and weight gradient: the loop and the grouped product."""
    heights, ends = groups(count, rows)
    total = sum(heights)
    x, g = torch.randn(total, dim).to(dtype), torch.randn(total, hidden).to(dtype)
    w = torch.randn(count, dim, hidden).to(dtype)
    out, grad = torch.empty_like(g), torch.empty_like(w)

    def loop_forward() -> None:
        for i, (a, o) in enumerate(zip(x.split(heights), out.split(heights), strict=True)):
            torch.mm(a, w[i], out=o)

    def loop_weights() -> None:
        for i, (a, b) in enumerate(zip(x.split(heights), g.split(heights), strict=True)):
            torch.mm(a.t(), b, out=grad[i])

    return {
        "forward": (loop_forward, lambda: void(F.grouped_mm(x, w, offs=ends))),
        "weight gradient": (loop_weights, lambda: void(F.grouped_mm(x.t(), g, offs=ends))),
    }


def void(_: Tensor) -> None:
    return None


def compared(loop: Callable[[], None], grouped: Callable[[], None], repeats: int) -> list[float]:
    """Ratio grouped to loop of neighbouring runs, ascending; and the loop's median ms."""
    ratios, spent = [], []
    for _ in range(repeats + 1):
        begin = time.process_time()
        loop()
        middle = time.process_time()
        grouped()
        end = time.process_time()
        ratios.append((end - middle) / max(middle - begin, 1e-9))
        spent.append(middle - begin)
    ratios = sorted(ratios[1:])
    return [statistics.median(ratios), ratios[0], ratios[-1], 1e3 * statistics.median(spent[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one thread, CPU time, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:2] if args.quick else SHAPES:
            for name, (loop, grouped) in ways(*shape, dtype).items():
                median, low, high, ms = compared(loop, grouped, 5 if args.quick else 15)
                found.append(
                    {"dtype": str(dtype), "shape": shape, "what": name, "ratio": median, "ms": ms}
                )
                print(
                    f"  {str(dtype)[6:]:9s} {shape[0]:3d} groups of ~{shape[1]} rows, "
                    f"{shape[2]} x {shape[3]}  {name:16s} loop {ms:7.2f} ms  "
                    f"grouped_mm {median:.2f}x [{low:.2f}-{high:.2f}]"
                )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""How good are the plans? Joint survival and balance, ours against the baselines.

    python benchmarks/placement_quality.py [--quick] [--json FILE]

On the SmartMoE routing trace (../shared/data/expert-load) when it is there, else on a synthetic
drifting load. Plans are 200 steps old when they are judged; shares come from the loads of the plan,
from 10 steps ago, or from the step itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from placement import PlacementRequest, certificate, plan
from placement.assignment.baselines import BASELINES, baseline
from placement.balance.shares import balance_of
from placement.plan import Plan

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "expert-load"
LOSSES = (1, 2, 3, 4)


def trace() -> tuple[np.ndarray, np.ndarray, str]:
    """Steps [T], loads [T, L, 32] and a name."""
    path = DATA / "smartmoe-expert-load.npz"
    if path.exists():
        data = np.load(path)
        return data["iters"], data["load"].astype(np.float64), "SmartMoE trace"
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.05, (501, 24, 32)), axis=0) + rng.normal(0, 1.5, (24, 32))
    load = np.exp(walk)
    return np.arange(501) * 10 + 1, load / load.sum(2, keepdims=True) * 262144, "synthetic drift"


def most_loaded(load: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` experts of each layer with the largest load over the whole trace."""
    top = np.sort(np.argsort(-load.mean(0), axis=1, kind="stable")[:, :count], axis=1)
    return np.take_along_axis(load, np.broadcast_to(top, (len(load), *top.shape)), 2)


def balance(member: np.ndarray, share_load: np.ndarray, load: np.ndarray) -> np.ndarray:
    """max/mean of each layer with shares made from ``share_load``."""
    return balance_of(load, member, share_load=share_load)


def judge(name: str, plans: list[Plan], loads: list[tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Survival and balance of one policy over all instants."""
    survival = [certificate(p, max_losses=max(LOSSES)).survival for p in plans]
    row: dict[str, Any] = {"policy": name}
    for k in LOSSES:
        values = [s.get(k, 0.0) for s in survival]
        row[f"P{k}"] = float(np.mean(values))
        row[f"P{k}_min"] = float(np.min(values))
    for index, label in enumerate(("plan_time", "ten_old", "own")):
        means = [
            balance(p.node_member, load[index], load[2]).mean()
            for p, load in zip(plans, loads, strict=True)
        ]
        row[label], row[f"{label}_worst"] = float(np.mean(means)), float(np.max(means))
    return row


def compare(
    load: np.ndarray, instants: list[int], *, age: int, nodes: int, slots: int, floor: int
) -> list[dict[str, Any]]:
    """All policies on plans ``age`` records old at each instant."""
    loads = [(load[i - age], load[i - 1], load[i]) for i in instants]
    rows = []
    for name in ("balanced", "safe", *BASELINES):
        plans = []
        for old, _, _ in loads:
            request = PlacementRequest(
                load=old,
                num_nodes=nodes,
                slots_per_node=slots,
                min_replicas=floor,
                profile=name if name in ("balanced", "safe") else "balanced",
            )
            plans.append(plan(request) if name in ("balanced", "safe") else baseline(name, request))
        rows.append(judge(name, plans, loads))
    return rows


def other_shapes(load: np.ndarray, quick: bool) -> list[dict[str, Any]]:
    """Other numbers of experts and nodes, and OLMoE's inference counts."""
    cases: list[tuple[str, np.ndarray, int, int]] = []
    for experts, nodes, slots in ((8, 4, 4), (8, 10, 6), (12, 10, 6), (32, 8, 8), (32, 16, 6)):
        cases.append((f"{experts} of SmartMoE", most_loaded(load, experts)[400], nodes, slots))
    zipf = np.arange(1, 129) ** -1.0
    rng = np.random.default_rng(1)
    wide = np.stack([rng.permutation(zipf) for _ in range(4 if quick else 12)]) * 1e5
    for experts, nodes, slots in ((64, 16, 12), (128, 32, 12), (128, 64, 8)):
        cases.append((f"zipf:1 {experts}", wide[:, :experts], nodes, slots))
    path = DATA / "olmoe-mixtral-expert-counts.json"
    if path.exists():
        counts = json.loads(path.read_text())["olmoe/expert_counts/c4"]
        olmoe = np.array([[row[str(e)] for e in range(64)] for row in counts.values()])
        cases.append(("OLMoE c4 64", olmoe, 16, 12))
    rows = []
    for name, case, nodes, slots in cases:
        for row in compare(case[None].repeat(2, 0), [1], age=1, nodes=nodes, slots=slots, floor=2):
            rows.append({"case": f"{name}, {nodes} x {slots}", **row})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """One table on stdout."""
    print(f"\n{title}")
    print(f"{'policy':12}" + "".join(f"{f'P{k}':>8}" for k in LOSSES)
          + f"{'plan-time':>18}{'10 old':>18}{'own':>18}   (mean, worst instant)")  # fmt: skip
    for row in rows:
        cells = "".join(f"{row[f'P{k}']:8.3f}" for k in LOSSES)
        for label in ("plan_time", "ten_old", "own"):
            cells += f"{row[label]:10.4f} {row[label + '_worst']:7.4f}"
        print(f"{row['policy']:12}{cells}   {row.get('case', '')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps, raw, name = trace()
    load = most_loaded(raw, 16)
    late = list(range(220, 501, 56 if args.quick else 11))
    early = [21, 30, 50] if args.quick else [21, 25, 30, 40, 50, 60]
    tables = {
        "late": compare(load, late, age=20, nodes=10, slots=6, floor=2),
        "early": compare(load, early, age=20, nodes=10, slots=6, floor=2),
        "shapes": other_shapes(raw, args.quick),
    }
    print(f"{name}: 16 most loaded experts of {load.shape[1]} layers, 10 nodes x 6 slots, floor 2")
    show(f"late: steps {steps[late[0]]}..{steps[late[-1]]}, {len(late)} instants, plan 200 old",
         tables["late"])  # fmt: skip
    show(f"early: steps {[int(steps[i]) for i in early]}, plan 200 old", tables["early"])
    show("other shapes, plan and shares of the same load", tables["shapes"])
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "trace": name, **tables}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

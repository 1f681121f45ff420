"""How little moves? Staying in place, relabelling and repair on the routing trace.

    python benchmarks/placement_migration.py [--quick] [--json FILE]

In place against a fresh plan with optimal relabelling, over the trace; then optimal against greedy
relabelling of MRO plans after losses; then the repair of one lost node; then the transfer schedule.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from placement_quality import most_loaded, trace

from placement import PlacementRequest, plan, replan
from placement.assignment.baselines import baseline
from placement.balance.shares import balance_of
from placement.migration.migrate import busiest, relabelled_member, transfers
from placement.migration.pairs import cheapest_pairs

NODES, SLOTS = 10, 6


def ask(load: np.ndarray, ids: tuple[int, ...] = ()) -> PlacementRequest:
    """A request for the bench's cluster, or for its survivors."""
    return PlacementRequest(
        load=load, num_nodes=len(ids) or NODES, slots_per_node=SLOTS, node_ids=ids
    )


def replicas_moved(present: np.ndarray, wanted: np.ndarray) -> int:
    """Replicas of ``wanted`` [L, E, N] that are not in ``present``."""
    return int((wanted & ~present).sum())


def relabel_costs(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Replicas to move if node n takes plan position p, summed over layers; [p, n]."""
    has, needs = (m.reshape(-1, m.shape[2]).astype(np.float64) for m in (present, wanted))
    return needs.sum(0)[:, None] - needs.T @ has


def best_relabelling(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The node of each position of a new plan such that the fewest replicas move, [N].

    The permutation is the same for all layers, because joint survival depends on the alignment of
    the layers. Ties: a node keeps its position.
    """
    costs = relabel_costs(present, wanted)
    position, node = cheapest_pairs(costs - 1e-6 * np.eye(len(costs)))
    answer = np.empty(len(costs), dtype=np.int32)
    answer[position] = node
    return answer


def greedy_relabelling(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The node of each position by the paper's greedy rule, cheapest pair first, [N]."""
    costs = relabel_costs(present, wanted)
    answer = np.full(len(costs), -1, dtype=np.int32)
    for _ in range(len(costs)):
        position, node = divmod(int(costs.argmin()), len(costs))
        answer[position] = node
        costs[position, :] = np.inf
        costs[:, node] = np.inf
    return answer


def in_place_against_fresh(load: np.ndarray, starts: list[int]) -> list[dict[str, Any]]:
    """Replicas moved and balance, by the age of the plan."""
    rows = []
    for age in (1, 5, 20, 50):
        stay, fresh, worse = [], [], []
        for start in starts:
            if start + age >= len(load):
                continue
            old, now = plan(ask(load[start])), ask(load[start + age])
            kept, new = replan(now, previous=old, rebalance=True), plan(now)
            best = best_relabelling(old.node_member, new.node_member)
            moved = relabelled_member(new.node_member, best)
            stay.append(replicas_moved(old.node_member, kept.node_member))
            fresh.append(replicas_moved(old.node_member, moved))
            worse.append(
                balance_of(now.load, kept.node_member).mean()
                - balance_of(now.load, new.node_member).mean()
            )
        rows.append(
            {"age_steps": age * 10, "in_place": float(np.mean(stay)),
             "relabelled": float(np.mean(fresh)), "ratio": float(np.sum(stay) / np.sum(fresh)),
             "worse": float(np.mean(worse)), "worst": float(np.max(worse))}
        )  # fmt: skip
    return rows


def relabelling(raw: np.ndarray, starts: list[int]) -> list[dict[str, Any]]:
    """Optimal against greedy relabelling of MRO plans 20 records apart, 1-4 nodes lost."""
    rng = np.random.default_rng(0)
    rows = []
    for experts in (8, 12, 16):
        load = most_loaded(raw, experts)[:, :12]
        for lost in (0, 1, 2, 3, 4):
            totals = np.zeros(3)
            for start in starts:
                if start + 20 >= len(load):
                    continue
                stay = np.sort(rng.permutation(NODES)[: NODES - lost])
                old = baseline("mro", ask(load[start])).node_member[:, :, stay]
                try:
                    new = baseline("mro", ask(load[start + 20], tuple(range(NODES - lost))))
                except ValueError:
                    continue
                wanted = new.node_member
                for i, order in enumerate((
                    best_relabelling(old, wanted), greedy_relabelling(old, wanted),
                    np.arange(NODES - lost),
                )):  # fmt: skip
                    totals[i] += replicas_moved(old, relabelled_member(wanted, order))
            if totals[1]:
                rows.append({"experts": experts, "lost": lost, "optimal": totals[0],
                             "greedy": totals[1], "stay": totals[2],
                             "saved": 1 - totals[0] / totals[1]})  # fmt: skip
    return rows


def repair(load: np.ndarray, starts: list[int]) -> dict[str, Any]:
    """One node lost: replicas moved by the repair, and by a relabelled fresh plan."""
    moved, fresh, before, after, skew = [], [], [], [], []
    for start in starts:
        old = plan(ask(load[start]))
        for node in range(NODES):
            ids = tuple(n for n in range(NODES) if n != node)
            then = replan(ask(load[start], ids), previous=old, lost=frozenset({node}))
            todo = transfers(old, then, lost=frozenset({node}))
            moved.append(len(todo))
            sent, received = busiest(todo)
            if todo:
                skew.append(max(sent, received) / max(1, received))
            new = plan(ask(load[start], ids)).node_member
            present = old.node_member[:, :, list(ids)]
            fresh.append(
                replicas_moved(present, relabelled_member(new, best_relabelling(present, new)))
            )
            before.append(balance_of(load[start], old.node_member).mean())
            after.append(balance_of(load[start], then.node_member).mean())
    return {"moved": float(np.mean(moved)), "moved_worst": int(np.max(moved)),
            "relabelled": float(np.mean(fresh)), "balance_before": float(np.mean(before)),
            "balance_after": float(np.mean(after)),
            "busiest_over_receiver": float(np.mean(skew)) if skew else 0.0}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, raw, name = trace()
    load = most_loaded(raw, 16)[:, :12]
    starts = list(range(200, 460, 65 if args.quick else 13))
    aged = in_place_against_fresh(load, starts)
    print(f"{name}, 12 layers x 16 experts x {NODES} nodes x {SLOTS} slots, {len(starts)} starts")
    print("age steps   in place   fresh, relabelled   ratio   max/mean worse (mean, worst)")
    for r in aged:
        print(f"{r['age_steps']:>9}{r['in_place']:>11.1f}{r['relabelled']:>20.1f}"
              f"{r['ratio']:>8.3f}{r['worse']:>12.4f} {r['worst']:.4f}")  # fmt: skip
    names = relabelling(raw, starts[:: 1 if args.quick else 4])
    print("MRO plans 200 steps apart: replicas moved   optimal    greedy   staying   saved")
    for r in names:
        print(f"  E={r['experts']:<3} {r['lost']} lost {r['optimal']:>35.0f}{r['greedy']:>10.0f}"
              f"{r['stay']:>10.0f}{r['saved']:>10.1%}")  # fmt: skip
    lost = [r["saved"] for r in names if r["lost"]]
    print(f"  mean over the settings with losses: {np.mean(lost):.1%}")
    fixed = repair(load, starts[::2] if args.quick else starts[::3])
    print(f"one node lost: {fixed['moved']:.1f} replicas move (worst {fixed['moved_worst']}), "
          f"a fresh relabelled plan moves {fixed['relabelled']:.1f}; max/mean "
          f"{fixed['balance_before']:.4f} before, {fixed['balance_after']:.4f} after; busiest "
          f"rank / busiest receiver {fixed['busiest_over_receiver']:.2f}")  # fmt: skip
    if args.json:
        args.json.write_text(
            json.dumps({"schema": 1, "in_place": aged, "relabelling": names, "repair": fixed})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

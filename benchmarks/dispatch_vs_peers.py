"""How fast is a whole training step with our dispatcher, beside DeepSpeed-MoE and others?

All contenders live in the same processes and take turns in short blocks; a round in which other
programs had much of the machine does not count. Figures are ratios of neighbouring blocks: median
[lowest-highest]. "core ms" is CPU time of all ranks per step over the number of cores.

Run: python benchmarks/dispatch_vs_peers.py [--quick] [--json FILE] [--only 4,8,1] [--profile]
DeepSpeed is measured where it is installed (extra ``bench``), else left out with a note.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from dispatch_contenders import Contender, Dense, Ours, Plain
from dispatch_deepspeed import DeepSpeed, join_default_group
from dispatch_loads import SEQ, TRACE, VOCAB, Setting
from dispatch_profile import Profile

from dispatcher import Exchange, SplitRule, within_machine
from dispatcher.memory import keep_freed_memory
from dispatcher.processes import run_processes

MILD = [
    Setting(ranks, experts, k, every)
    for every in (2, 1)
    for ranks, experts, k in [
        (4, 8, 1), (4, 8, 2), (4, 16, 1), (4, 16, 2), (8, 8, 1), (8, 16, 1), (8, 8, 2), (8, 16, 2),
    ]
]  # fmt: skip
GRIDS = [MILD] + [[replace(s, **{name: True}) for s in MILD] for name in ("zipf", "trace", "own")]
HOT = [Setting(4, 16, 2, hot=True), Setting(4, 8, 1, hot=True)]
BF16 = [Setting(4, 8, 1, bf16=True), Setting(4, 16, 2, zipf=True, bf16=True)]
ARITHMETIC = (
    "dense forward and backward, rest", "experts forward", "experts backward", "optimizer",
)  # fmt: skip
ROWS_PER_REPLICA = 128.0  # the default of dispatch.rows_per_replica on CPUs
FOREIGN = 0.08  # part of the machine that other programs may have in a round that counts
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def contenders(setting: Setting, exchange: Exchange, who: str) -> list[Contender]:
    """Everybody who takes part, ours first.

    Args:
        setting: The shape.
        exchange: The ranks, over gloo.
        who: "all"; "few": ours and DeepSpeed; "splits": ours by the other rules; "ours": ours and
            what its parts cost.

    Where forced loads are level (mild, zipf) ours keeps an expert's tokens at its home replica; for
    loads of a trace or of routers in their first steps it spreads what pays, by the default costs
    and with ranks that share this machine's cores (``dispatch.mode = "balanced"``).
    """
    near = within_machine(exchange)
    cores = max(1.0, setting.ranks / (os.cpu_count() or 1))
    spread = SplitRule(mode="balanced", rows_per_replica=ROWS_PER_REPLICA, ranks_per_device=cores)
    rule = spread if setting.own or setting.trace else SplitRule()
    out: list[Contender] = [Ours("ours", setting, near, rule=rule)]
    if HAS_DEEPSPEED and who in ("all", "few"):
        join_default_group(exchange)
        out.append(DeepSpeed("deepspeed 1.25", setting, exchange, drop=True))
        out.append(DeepSpeed("deepspeed no-drop", setting, exchange, drop=False))
    if who in ("all", "ours"):
        out.append(Ours("ours r=1", setting, near, replicas=1, rule=rule))
        out.append(Ours("ours no commit", setting, near, commit=False, rule=rule))
    if who in ("all", "splits"):
        other = SplitRule() if rule is spread else spread
        out.append(Ours(f"ours {other.mode}", setting, near, rule=other))
    if who == "splits":
        alone = replace(spread, ranks_per_device=1.0)
        out.append(Ours("ours balanced, as if a core each", setting, near, rule=alone))
    if who == "all":
        out.append(Ours("ours over gloo", setting, exchange, rule=rule))
        out.append(Plain("plain all-to-all", setting, exchange))
        out.append(Dense("dense twin", setting, exchange))
    return out


def measure(
    exchange: Exchange, setting: Setting, blocks: int, steps: int, who: str, profile: bool
) -> dict[str, Any]:
    """One rank's part: warm up, then ``blocks`` rounds of ``steps`` steps of every contender."""
    keep_freed_memory()
    everyone = contenders(setting, exchange, who)
    random = torch.Generator().manual_seed(exchange.rank)
    times: dict[str, list[tuple[float, float, float]]] = {c.name: [] for c in everyone}
    loads: dict[str, list[float]] = {c.name: [] for c in everyone}
    for block in range(blocks + 1):
        for contender in everyone:
            batches = [
                {"tokens": torch.randint(VOCAB, (setting.batch, SEQ + 1), generator=random)}
                for _ in range(steps)
            ]
            exchange.all_reduce(torch.zeros(1), label="digest")
            wall, core, busy = time.perf_counter(), time.process_time(), busy_seconds()
            for batch in batches:
                contender.step(batch)
            exchange.all_reduce(torch.zeros(1), label="digest")
            if block:
                spent = (time.perf_counter() - wall, time.process_time() - core)
                busy = busy_seconds() - busy
                times[contender.name].append((spent[0] / steps, spent[1] / steps, busy / steps))
                loads[contender.name].append(contender.load())
            else:
                contender.settle()
    sections = {}
    if profile:
        for contender in everyone:
            if isinstance(contender, Ours):
                with Profile(contender) as watch:
                    for batch in batches:
                        contender.step(batch)
                sections[contender.name] = {k: v / steps for k, v in watch.spent.items()}
                break
    dropped = {c.name: c.dropped() for c in everyone if isinstance(c, DeepSpeed)}
    return {"times": times, "loads": loads, "dropped": dropped, "sections": sections}


def busy_seconds() -> float:
    """CPU time that this machine has spent on anything, in all cores together."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def quiet_rounds(by_rank: list[dict[str, Any]]) -> tuple[list[int], float]:
    """Rounds in which other programs had little of the machine beside each contender's block.

    Returns:
        Their numbers, or those of the quieter half where there is none; and the largest part of
        the machine that others had in them.
    """
    cores = os.cpu_count() or 1
    foreign = []
    for blocks in zip(*(zip(*r["times"].values(), strict=True) for r in by_rank), strict=True):
        shares = []
        for ranks in zip(*blocks, strict=True):  # one contender's block, as every rank saw it
            wall, busy = max(b[0] for b in ranks), max(b[2] for b in ranks)
            shares.append((busy - sum(b[1] for b in ranks)) / (wall * cores))
        foreign.append(max(shares))
    limit = max(FOREIGN, statistics.median(foreign)) if min(foreign) > FOREIGN else FOREIGN
    kept = [i for i, share in enumerate(foreign) if share <= limit]
    return kept, max(foreign[i] for i in kept)


def summary(setting: Setting, by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Wall of the slowest rank, CPU time of all, ratios block by block against ours."""
    cores = os.cpu_count() or 1
    names = list(by_rank[0]["times"])
    (kept, share), rounds = quiet_rounds(by_rank), len(by_rank[0]["times"][names[0]])
    for rank in by_rank:
        rank["times"] = {n: [blocks[i] for i in kept] for n, blocks in rank["times"].items()}
    wall = {n: [max(w) for w in zip(*_column(by_rank, n, 0), strict=True)] for n in names}
    core = {n: [sum(c) / cores for c in zip(*_column(by_rank, n, 1), strict=True)] for n in names}
    ratios = {n: sorted(b / a for a, b in zip(wall["ours"], wall[n], strict=True)) for n in names}
    sections: dict[str, float] = {}
    for rank in by_rank:
        for parts in rank["sections"].values():
            for name, seconds in parts.items():
                sections[name] = sections.get(name, 0.0) + 1e3 * seconds / cores
    return {
        "setting": asdict(setting),
        "routing": setting.routing,
        "name": str(setting),
        "loads": {n: spread(v) for n, v in by_rank[0]["loads"].items() if any(v)},
        "dropped": by_rank[0]["dropped"],
        "rounds": (len(kept), rounds),
        "foreign_share": share,
        "wall_ms": {n: 1e3 * statistics.median(v) for n, v in wall.items()},
        "core_ms": {n: 1e3 * statistics.median(v) for n, v in core.items()},
        "ratio": {n: (statistics.median(v), v[0], v[-1]) for n, v in ratios.items()},
        "core_ratio": {
            n: statistics.median(b / a for a, b in zip(core["ours"], v, strict=True))
            for n, v in core.items()
        },
        "sections_core_ms": sections,
        "overhead": overhead(sections),
    }


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and largest."""
    return statistics.median(values), min(values), max(values)


def _column(by_rank: list[dict[str, Any]], name: str, which: int) -> list[list[float]]:
    return [[pair[which] for pair in rank["times"][name]] for rank in by_rank]


def show(row: dict[str, Any]) -> None:
    kept, rounds = row["rounds"]
    print(
        f"\n{row['name']}   {kept} of {rounds} rounds count, "
        f"others had up to {row['foreign_share']:.0%} in them"
    )
    for name, (median, low, high) in row["ratio"].items():
        print(
            f"  {name:18s} {row['wall_ms'][name]:8.1f} ms  core {row['core_ms'][name]:8.1f} ms  "
            f"against ours {median:5.2f} [{low:.2f}-{high:.2f}]  "
            f"by core {row['core_ratio'][name]:.2f}" + _load_of(row, name)
        )
    for name, spent in sorted(row["sections_core_ms"].items(), key=lambda item: -item[1]):
        print(f"      {name:24s} {spent:7.1f} core ms")
    if row["sections_core_ms"]:
        print(f"      beyond arithmetic and optimizer {row['overhead']:.1%}")


def overhead(sections: dict[str, float]) -> float:
    """Part of our step that neither the model's arithmetic nor its optimizer takes."""
    arithmetic = sum(sections.get(name, 0.0) for name in ARITHMETIC)
    return 1.0 - arithmetic / sum(sections.values()) if sections else 0.0


def _load_of(row: dict[str, Any], name: str) -> str:
    if name not in row["loads"]:
        return ""
    median, low, high = row["loads"][name]
    lost = f", drops {row['dropped'][name]:.0%}" if row["dropped"].get(name) else ""
    return f"  max/mean {median:.1f} [{low:.1f}-{high:.1f}]{lost}"


def floor_ms(setting: Setting, steps: int) -> float:
    """The dense twin on all ranks' tokens in one process that has every core, ms a step."""
    whole = replace(setting, ranks=1, batch=setting.batch * setting.ranks)
    result = run_processes(_floor, size=1, args=(whole, steps), threads=os.cpu_count() or 1)
    return 1e3 * float(result[0])


def _floor(exchange: Exchange, setting: Setting, steps: int) -> float:
    keep_freed_memory()
    contender = Dense("dense twin", setting, exchange)
    batch = {"tokens": torch.randint(VOCAB, (setting.batch, SEQ + 1))}
    contender.step(batch)
    spent = []
    for _ in range(steps):
        begin = time.perf_counter()
        contender.step(batch)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else float("nan")


def verdict(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the house set itself, for each kind of routing that was run."""
    out = {}
    parts = {"all shapes": (), "E=8 top-1": (8, 1), "E=8 top-2": (8, 2)}
    for routing in dict.fromkeys(r["routing"] for r in rows):
        grid = [r for r in rows if r["routing"] == routing and not r["setting"]["bf16"]]
        for name in ("deepspeed 1.25", "deepspeed no-drop", "plain all-to-all", "ours r=1"):
            for part, wanted in parts.items():
                found = [
                    r["ratio"][name][0]
                    for r in grid
                    if name in r["ratio"]
                    and wanted in ((), (r["setting"]["experts"], r["setting"]["top_k"]))
                ]
                if found:
                    label = f"{routing}, {name}, {part}"
                    out[f"{label}: geometric mean"] = geometric_mean(found)
                    out[f"{label}: worst"] = min(found)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, few blocks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", help="ranks,experts,top_k of one shape")
    parser.add_argument(
        "--routing", choices=("mild", "zipf", "trace", "own", "hot"), help="only this routing"
    )
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast only")
    parser.add_argument("--every", type=int, help="MoE in every n-th layer only")
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--first", type=int, default=99, help="only so many of the shapes chosen")
    parser.add_argument(
        "--who", choices=("all", "few", "splits", "ours"), default="all",
        help="few: ours and DeepSpeed; splits: ours by each rule; "
        "ours: ours with one replica and without commit beside it",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="sections of our step")
    args = parser.parse_args()
    settings = [s for grid in GRIDS for s in grid if TRACE.exists() or not s.trace] + HOT
    if not TRACE.exists():
        print(f"{TRACE.name} is not here: its loads are left out")
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        settings += BF16
    else:
        print("this CPU has no bf16 products: bf16 is left out (fp32 is up to fifty times faster)")
    if args.quick:
        settings = [MILD[0], HOT[1]]
    if args.only:
        shape = tuple(int(n) for n in args.only.split(","))
        settings = [s for s in settings if (s.ranks, s.experts, s.top_k) == shape]
    if args.bf16:
        settings = [s for s in settings if s.bf16]
    if args.routing:
        settings = [s for s in settings if s.routing == args.routing]
    if args.every:
        settings = [s for s in settings if s.moe_every == args.every]
    settings = settings[: args.first]
    blocks = args.blocks or (3 if args.quick else 7)
    print(
        f"GPT 4 layers, d=256, FFN 1024, seq {SEQ}, batch 4 a rank, fp32 unless said, 1 thread a "
        f"rank, ours over shared memory, others over gloo, AdamW fused for all, {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f}, {blocks} blocks of {args.steps} steps, "
        f"torch {torch.__version__}"
    )
    if not HAS_DEEPSPEED:
        print("deepspeed is not installed here (extra bench): left out")
    rows = []
    for setting in settings:
        by_rank = run_processes(
            measure, size=setting.ranks, timeout_s=600,
            args=(setting, blocks, args.steps, args.who, args.profile),
        )  # fmt: skip
        row = summary(setting, by_rank)
        row["floor_ms"] = floor_ms(setting, args.steps)
        show(row)
        print(
            f"      floor: dense twin, same tokens, one process, all cores {row['floor_ms']:.1f} ms"
        )
        rows.append(row)
    figures = verdict(rows)
    print("\n" + "\n".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()

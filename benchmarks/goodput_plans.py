"""When nodes die in goodput_under_faults.py, and how each of our systems is configured."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

from goodput_shapes import SHAPES, Shape, Timing, timing

from lazarus.simulate.inputs.traces import read_trace, segment

COMMON = (
    "metrics.progress=off", "metrics.report=false", "train.steps=100000", "optim.lr=0.001",
    "optim.warmup_steps=20", "checkpoint.full_at_end=false", "recovery.tolerated_stall_s=10",
    "cluster.min_nodes=1",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all systems go through: seconds since the first commit at which a node dies."""

    name: str
    shape: Shape
    timing: Timing
    nodes: int
    period_s: float
    wall_s: float
    kills_s: tuple[float, ...]
    left_out: str = ""  # what the schedule holds and no system goes through


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The options, if they go together; else the parser ends the program."""
    if (args.schedule == "trace") != bool(args.trace):
        parser.error("--schedule trace and --trace FILE need each other")
    if args.trace and not Path(args.trace).is_file():
        parser.error(f"--trace {args.trace}: no such file")
    return args


def periodic(args: argparse.Namespace, seed: int) -> Plan:
    """A kill every period until half of the nodes are left; gaps jittered as asked.

    The first comes when the seed says, so that no system's saves keep time with the kills.
    """
    rng = random.Random(seed)
    at_s = args.period * rng.uniform(0.8, 1.2)
    kills = [at_s]
    while len(kills) < _half(args):
        at_s += args.period * rng.uniform(1 - args.jitter, 1 + args.jitter)
        kills.append(at_s)
    name = f"every {args.period:g} s" + (f" +- {args.jitter:.0%}" if args.jitter else "")
    return _plan(name, args, tuple(kills))


def poisson(args: argparse.Namespace, seed: int) -> Plan:
    """Exponential gaps with the same mean."""
    rng, at_s, kills = random.Random(seed), 0.0, []
    while len(kills) < _half(args):
        at_s += rng.expovariate(1 / args.period)
        if at_s >= _wall_s(args) - 5:
            break
        kills.append(at_s)
    return _plan(f"Poisson {args.period:g} s", args, tuple(kills))


def traced(args: argparse.Namespace, seed: int) -> Plan:
    """The first removals of a spot trace; ``left_out`` counts its adds and later removals."""
    del seed
    trace = read_trace(args.trace, time_scale=args.time_scale)
    first = next((e.at_s for e in trace.events if e.kind == "remove"), 0.0)
    length_s = _wall_s(args) - 5
    part = segment(trace, start_s=first - 5, length_s=length_s, most_nodes=args.nodes)
    kills = [e.at_s for e in part.events if e.kind == "remove" for _ in e.nodes]
    most = args.nodes // 2
    adds = sum(len(e.nodes) for e in part.events if e.kind == "add" and e.at_s > 0)
    left_out = f"{adds} nodes that the trace adds, {len(kills[most:])} that it removes later"
    plan = _plan(Path(args.trace).name, args, tuple(kills[:most]))
    return replace(plan, left_out=left_out if adds or kills[most:] else "")


def _half(args: argparse.Namespace) -> int:
    nodes: int = args.nodes
    return nodes - nodes // 2


def _wall_s(args: argparse.Namespace) -> float:
    return float(args.period) * (_half(args) + 1)


def _plan(name: str, args: argparse.Namespace, kills: tuple[float, ...]) -> Plan:
    shape = SHAPES[args.shape]
    return Plan(
        name=name,
        shape=shape,
        timing=timing(
            shape, period_s=args.period, nodes=args.nodes, device_ms=args.device_ms,
            write_s=args.write_s,
        ),
        nodes=args.nodes,
        period_s=args.period,
        wall_s=_wall_s(args),
        kills_s=kills,
    )  # fmt: skip


def assumptions(plan: Plan) -> str:
    """What is modelled in this run, for its reader."""
    timing, shape = plan.timing, plan.shape
    device = "not modelled"
    if timing.device_s:
        part = f"{timing.expert_part:.0%} of it where its experts are"
        device = f"{1000 * timing.device_s:g} ms a sample, {part}"
    left_out = f" (left out: {plan.left_out})" if plan.left_out else ""
    storage = f"{timing.write_s:.2f} s a full checkpoint" if timing.write_s else "not modelled"
    return (
        f"shape {shape.name}: {shape.experts} experts in {shape.layers} layers, dim {shape.dim}, "
        f"top-{shape.top_k}, {shape.batch} samples of {shape.seq_len} tokens; {plan.nodes} nodes, "
        f"kills {plan.name}{left_out}\ndevices: {device}; storage: {storage}; DS saves every "
        f"{timing.every_b} steps, DS(FT) every {timing.every_c}"
    )


def usable(system: str, plan: Plan, live: int) -> int:
    """Nodes that a start of the system can use."""
    return plan.shape.usable(live) if system in ("b", "B", "d") else live


def saves_every(system: str, plan: Plan) -> int:
    """Steps between the saves that training waits for; 0: it waits for none."""
    b, c = plan.timing.every_b, plan.timing.every_c
    return {"b": b, "B": b, "d": b, "c": c, "C": c}.get(system, 0)


def overrides(
    system: str, plan: Plan, folder: Path, *, nodes: int, seed: int, is_warm: bool = False
) -> list[str]:
    """The configuration of one of our systems.

    Args:
        is_warm: Ranks of a restart are forked from an interpreter that has imported torch.
    """
    shape = plan.shape
    launcher = "cold" if system in ("b", "B") and not is_warm else "process"
    every = saves_every(system, plan)
    # As on a cluster, where every rank has a device of its own. There sending an expert's gradient
    # takes about as long as serving a third of its rows (17 MB over 100 Gb/s; 50 Mflop a row).
    rows = shape.batch * shape.seq_len * shape.top_k // shape.experts // 3
    split = ["dispatch.mode=balanced", f"dispatch.rows_per_replica={rows}"]
    full = ["placement.min_replicas=1", "checkpoint.select=full", f"checkpoint.every={every}"]
    given = {
        "a": ["placement.min_replicas=2", f"placement.slots_per_node={shape.experts // 2}",
              "checkpoint.every=100", *(split if plan.timing.device_s else [])],
        "b": [*full, f"placement.slots_per_node={shape.experts // nodes}",
              "recovery.on_lost_expert=fail"],
        "c": [*full, "placement.slots_per_node=auto", "placement.spare_losses=0",
              "recovery.on_lost_expert=rollback"],
    }[system.lower()]  # fmt: skip
    overlap = "on" if plan.timing.device_s else "auto"  # as with a device for each rank
    return [*COMMON, *shape.overrides(), *given, f"cluster.launcher={launcher}",
            f"dispatch.overlap={overlap}",
            f"cluster.nodes={nodes}", f"run.dir={folder}", f"run.seed={seed}"]  # fmt: skip

"""``lazarus simulate``: the production decisions about a fleet, on a virtual clock."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lazarus.commands import runs
from lazarus.errors import ConfigError
from lazarus.record import loads
from lazarus.simulate.inputs.costs import PROFILES, read_profile
from lazarus.simulate.inputs.faults import FaultSource, FromTrace, Periodic, Poisson
from lazarus.simulate.inputs.shapes import Shape, shape_named
from lazarus.simulate.inputs.traces import read_trace, segment
from lazarus.simulate.rows import Row, Setting
from lazarus.simulate.studies import findings
from lazarus.simulate.studies.assumed import assumptions, setting_line
from lazarus.simulate.studies.options import DEFAULTS, refuse_ignored
from lazarus.simulate.studies.progress import Progress
from lazarus.simulate.studies.scenarios import SCENARIOS, Files, check_claims, scenario_named
from lazarus.simulate.studies.tables import TABLES
from lazarus.simulate.systems.peers import PeerPolicy
from lazarus.simulate.systems.policies import policy_named, run_one, with_recovery

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_POLICIES = "lazarus,ds,ds-ft"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("simulate", help="what a fleet would gain", description=__doc__)
    add = parser.add_argument
    add("scenario", nargs="?", help=f"{', '.join([*SCENARIOS, *TABLES])}; or options")
    add("--shape", help="model shape (default: gpt-l)")
    add("--profile", help="costs: a name, or a file of lazarus calibrate (default: h200-8x400g)")
    add("--nodes", type=int, nargs="+",
        help="nodes at the start (default: 16); several are compared")  # fmt: skip
    add("--slots", type=int, nargs="+", help="slots per node and layer; several are compared")
    add("--min-replicas", type=int, nargs="+", help="floors (default: 2); several are compared")
    add("--memory", type=float, help="GB of a node for training state: slots that fit are compared")
    add("--price", type=float, help="of a node and hour: adds what a billion tokens cost")
    add("--load", help="uniform, zipf:S, or a file, .npz or .npy, [T, L, E] (default: zipf:0.5)")
    add("--mtbf", help="mean time between failures of one node, such as 12h")
    add("--period", help="one failure every so often, such as 5min, until half are left")
    add("--trace", metavar="FILE", help="spot trace, Bamboo's or Parcae's form")
    add("--time-scale", type=float, help="multiplies the times of the trace (default: 1)")
    add("--replace-after", help="another node comes for a lost one; or never (default: 10min)")
    add("--zones", type=int, help="zones that can fail as one")
    add("--zone-mtbf", help="mean time between failures of one zone")
    add("--hours", type=float, help="virtual hours (default: 24)")
    add("--tokens-per-node", type=float, help="of the global batch, at the start (default: 65536)")
    add("--group", type=int, help="nodes that hold one set of experts, for the peers")
    add("--layers", type=int, help="layers that plans hold; the others are alike")
    add("--policies", help=f"names or module:Name, comma-separated (default: {_POLICIES})")
    add("--recovery", help="module:Name of a policy for experts without a live replica")
    add("--seeds", type=int, help="seeds 0, 1, ... (default: 1, or the scenario's)")
    add("--plot", metavar="FILE", help="a page with charts")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulate a named scenario, or a fleet described by options."""
    started = time.monotonic()
    refuse_ignored(vars(args))
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(f"--seeds {args.seeds} must be a whole number >= 1")
    if args.scenario in TABLES:
        return _table(args)
    if args.scenario:
        scenario = scenario_named(args.scenario)
        settings = list(scenario.build(_files(args)))
        policies = args.policies.split(",") if args.policies else list(scenario.policies)
        seeds = range(args.seeds or scenario.seeds)
    else:
        scenario = None
        settings = _settings(args)
        policies = (args.policies or _POLICIES).split(",")
        seeds = range(args.seeds or 1)
    rows = _run_all(settings, policies, seeds, recovery=args.recovery, once=scenario is None)
    claims = check_claims(scenario, rows) if scenario else []
    if args.json:
        runs.print_json(
            {
                "schema": 1,
                "rows": [row.to_dict() for row in rows],
                "findings": findings.findings(rows, price=args.price),
                "published": claims,
                "assumptions": assumptions(settings, policies=policies),
                "wall_s": round(time.monotonic() - started, 3),
            }
        )
    else:
        _print(assumptions(settings, policies=policies), rows, claims, price=args.price)
    if args.plot:
        from lazarus.report.simulated import write_plot

        runs.say(f"charts in {write_plot(rows, out=args.plot)}")
    return 0


def _table(args: argparse.Namespace) -> int:
    """An experiment without a clock: one row each."""
    rows = TABLES[args.scenario](_files(args))
    figures = [{"profile": n, "source": c.source, "figures": c.assumptions()}
               for n, c in PROFILES.items() if n == "rtx3090-100g"]  # fmt: skip
    if args.json:
        runs.print_json({"schema": 1, "rows": rows, "assumptions": figures})
        return 0
    for row in rows:
        print(f"{row['part']:26} " + "  ".join(f"{k}={v}" for k, v in row.items() if k != "part"))
    print("cost model rtx3090-100g; --json prints its figures")
    return 0


def _run_all(
    settings: list[Setting],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    recovery: str | None,
    once: bool,
) -> list[Row]:
    """Every part, policy and seed; says how far it is every two seconds.

    Args:
        recovery: Dotted path of a recovery policy.
        once: Run a model of a peer once for settings that differ only in what it does not know.
    """
    jobs, known = [], set()
    for setting in settings:
        for policy in (policy_named(name, setting) for name in policies):
            if once and isinstance(policy, PeerPolicy):  # knows neither slots nor floors
                same = replace(setting, name="", slots_per_node=1, min_replicas=1).digest()
                if (policy, same) in known:
                    continue
                known.add((policy, same))
            jobs += [(setting, with_recovery(policy, recovery), seed) for seed in seeds]
    rows: list[Row] = []
    # Large fleets make millions of small frozen objects and no cycles: look for those less often.
    gc.set_threshold(200_000, 50, 50)
    progress = Progress(len(jobs), say=runs.say)
    for setting, policy, seed in jobs:
        name = f"{setting.name} {policy.name} seed {seed}"
        progress.begins(name, horizon_s=setting.horizon_s)
        rows.append(run_one(setting, policy, seed=seed, on_clock=progress.at))
        progress.ended()
    return rows


def _files(args: argparse.Namespace) -> Files:
    load = Path(args.load) if loads.is_load_file(args.load) else None
    if load is not None and not load.is_file():
        raise ConfigError(f"--load {load}: no such file")
    return Files(expert_load=load, spot_trace=Path(args.trace) if args.trace else None)


def _settings(args: argparse.Namespace) -> list[Setting]:
    _check(args)
    shape, costs = shape_named(args.shape), read_profile(args.profile)
    settings = []
    for most in args.nodes:
        faults, nodes = _faults(args, most)
        slots = _slots(args, shape, nodes)
        layers = args.layers or _placed_layers(shape.moe_layers * shape.experts * nodes, nodes)
        layers = min(layers, shape.moe_layers)
        base = Setting(
            name="",
            shape=shape,
            costs=costs,
            load=_load(args.load, layers, shape.experts),
            faults=faults,
            num_nodes=nodes,
            slots_per_node=slots[0],
            horizon_s=args.hours * 3600.0,
            tokens_per_step=args.tokens_per_node * nodes,
            group=args.group or max(1, min(nodes, -(-shape.experts // slots[0]))),
            placed_layers=layers,
        )
        settings += [
            replace(base, name=f"{shape.name} x {nodes}, {s} slots, floor {f}", slots_per_node=s,
                    min_replicas=f)
            for s in slots
            for f in args.min_replicas
            if args.slots or f == min(args.min_replicas) or s * nodes >= f * shape.experts
        ]  # fmt: skip
    return settings


def _slots(args: argparse.Namespace, shape: Shape, nodes: int) -> list[int]:
    """Slots to compare: those given, or enough for the floors; no more than the memory holds.

    Raises:
        ConfigError: They are too few for all experts.
    """
    fewest = -(-shape.experts // nodes)
    left = max(1, nodes - 2)
    slots: list[int] = args.slots or [max(2 * fewest, -(-2 * shape.experts // left))]
    if args.memory is not None:
        room = args.memory * 1e9 - shape.dense_bytes
        fit = int(room // (shape.moe_layers * shape.expert_bytes))
        if fit < fewest:
            need = (shape.dense_bytes + fewest * shape.moe_layers * shape.expert_bytes) / 1e9
            raise ConfigError(
                f"--memory {args.memory:g} GB is too little for {shape.experts} experts of "
                f"{shape.name} on {nodes} nodes: {need:,.0f} GB a node hold each expert once"
            )
        wanted = [-(-shape.experts * min(f, left) // left) for f in args.min_replicas]
        most = min(fit, shape.experts)
        if args.slots and min(args.slots) > most:
            raise ConfigError(
                f"--slots {' '.join(map(str, args.slots))}: at most {most} make sense with "
                f"--memory {args.memory:g} GB and {shape.experts} experts of {shape.name}"
            )
        slots = args.slots or sorted({*wanted, fit, (fewest + fit + 1) // 2})
        slots = [s for s in slots if s <= most] or [most]
    for given in slots:
        if given * nodes < shape.experts:
            raise ConfigError(
                f"{nodes} nodes x {given} slots = {given * nodes} < {shape.experts} experts of "
                f"{shape.name}; use --slots {fewest} or more nodes"
            )
    return slots


def _check(args: argparse.Namespace) -> None:
    """Refuse what no run can have.

    Raises:
        ConfigError: With the option and its value.
    """
    for name in ("nodes", "slots", "min_replicas", "layers", "group"):
        given = getattr(args, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be a whole number >= 1")
    for name in ("hours", "tokens_per_node"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be a finite number > 0")
    for name in ("memory", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value} must be a finite number > 0")
    if args.zones < 0:
        raise ConfigError(f"--zones {args.zones} must be a whole number >= 0")


def _placed_layers(cells: int, nodes: int) -> int:
    """Few layers stand for all where plans would be large; the template is alike in all."""
    if cells <= 200_000:
        return 1 << 30
    return 2 if nodes <= 2_000 else 1


def _load(text: str, layers: int, experts: int) -> loads.LoadTrace:
    if text == "uniform":
        return loads.uniform_load(layers, experts)
    if text.startswith("zipf:"):
        return loads.zipf_load(layers, experts, _number(text[5:], "--load"))
    return loads.fitted(loads.load_loads(text), num_layers=layers, num_experts=experts)


def _faults(args: argparse.Namespace, nodes: int) -> tuple[FaultSource, int]:
    given = [name for name in ("mtbf", "period", "trace") if getattr(args, name)]
    if len(given) > 1:
        raise ConfigError(f"give one of --mtbf, --period and --trace, not {len(given)}")
    if args.trace:
        trace = read_trace(args.trace, time_scale=args.time_scale)
        part = segment(trace, start_s=0, length_s=args.hours * 3600, most_nodes=nodes)
        source = FromTrace(trace=part)
        return source, max(1, len(source.start))
    if args.period:
        return Periodic(every_s=_seconds(args.period), until=-(-nodes // 2)), nodes
    never = args.replace_after == "never"
    source_ = Poisson(
        node_mtbf_s=_seconds(args.mtbf or "30d"),
        replace_s=None if never else _seconds(args.replace_after),
        zones=args.zones,
        zone_mtbf_s=_seconds(args.zone_mtbf) if args.zone_mtbf else float("inf"),
    )
    return source_, nodes


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{option}: {text!r} is not a number >= 0")
    return value


def _seconds(text: str) -> float:
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit):
            value = _number(text.removesuffix(unit), "time")
            if value > 0:
                return value * _UNITS[unit]
    raise ConfigError(f"{text!r} is not a time such as 30s, 5min, 12h or 30d")


def _print(
    assumed: list[dict[str, Any]],
    rows: Sequence[Row],
    claims: list[dict[str, Any]],
    *,
    price: float | None,
) -> None:
    print("\n".join(findings.table(rows, price=price)))
    if not claims:
        print("\n".join(findings.findings(rows, price=price)))
    for claim in claims:
        mark = "reached" if claim["reached"] else f"SHORT: {claim['why_short']}"
        ours = "without bound" if claim["ours"] is None else claim["ours"]
        low, high = ("no bound" if x is None else x for x in claim["range"])
        print(f"published {claim['part']}: {claim['what']} {claim['published']} | ours "
              f"{ours} [{low} to {high}]  {mark}")  # fmt: skip
    for profile in assumed:
        print(f"\ncost model {profile['profile']} ({profile['source']}):", file=sys.stdout)
        for item in profile["figures"]:
            print(f"  {item['name']:24} {item['value']!s:>14} {item['unit']:10} {item['why']}")
        for setting in profile["settings"]:
            print(f"  {setting_line(setting)}")
        named = [item for setting in profile["settings"] for item in setting["policies"].items()]
        for name, figures in {name: p["costs"] for name, p in named if p.get("costs")}.items():
            print(f"  {name}: " + ", ".join(f"{k} {v:g}" for k, v in figures.items()))

"""What the commands that start a run share: options, configuration, the end."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazarus.basics.format import bytes_text, count_text, loss_text, plural, seconds_text
from lazarus.config.hf_folder import hf_problems
from lazarus.config.layers import Given
from lazarus.config.preflight import BUILTIN_CHECKS
from lazarus.config.train_config import TrainConfig
from lazarus.config.values import toml_value
from lazarus.errors import ConfigError, Problem
from lazarus.record.metrics import Summary
from lazarus.run.run_folders import homes, run_folder

if TYPE_CHECKING:
    from lazarus.run.result import Result

# Option -> key. A named flag wins over everything else.
FLAGS: Mapping[str, str] = {
    "nodes": "cluster.nodes",
    "min_nodes": "cluster.min_nodes",
    "address": "cluster.address",
    "steps": "train.steps",
    "seed": "run.seed",
    "run_dir": "run.dir",
    "digest_every": "run.digest_every",
    "fault": "faults.specs",
    "chaos": "faults.chaos",
    "progress": "metrics.progress",
}

_CHECKS = (*BUILTIN_CHECKS, hf_problems)
_FILES = ("model.hf", "data.path", "data.tokenizer")  # keys of files that training needs


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Where a configuration comes from."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="configuration file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.key=value",
        help="set one key; may be repeated",
    )
    parser.add_argument("--preset", metavar="NAME", help="tiny, gpt-s, gpt-m or gpt-l")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Named flags for the keys that are used most."""
    add = parser.add_argument
    add("--nodes", type=int, metavar="N", help="nodes at the start")
    add("--min-nodes", type=int, metavar="N", help="hold the state when fewer are left")
    add("--steps", type=int, metavar="S", help="steps to commit")
    add("--seed", type=int, metavar="SEED", help="seed of weights and samples")
    add("--run-dir", metavar="DIR", help="folder of the record")
    add("--address", metavar="ADDR", help="Ray cluster to join, instead of an embedded one")
    add(
        "--fault",
        action="append",
        metavar="SPEC",
        help="KIND[:NODE]@STEP[/PHASE][,key=value]..., such as kill:2@20; may be repeated",
    )
    add("--chaos", metavar="SPEC", help="random faults, such as mtbf=30s,seed=1,kinds=kill+join")
    add("--digest-every", type=int, metavar="K", help="put the state's digest into the record")
    add("--progress", choices=("auto", "line", "json", "off"), help="what stderr shows")


def load_config(
    args: argparse.Namespace, *, base: Sequence[str] = (), needs_files: bool = True
) -> TrainConfig:
    """The configuration that options, file and environment make, checked as far as possible.

    Args:
        args: Parsed options, with the process's ``environment``.
        base: Settings of the command itself, weaker than the user's ``--set``.
        needs_files: Model and data must be there; False: perhaps they are on other machines.

    Raises:
        ConfigError: Every problem at once.
    """
    flags = {}
    for name, dotted in FLAGS.items():
        value = getattr(args, name, None)
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            given = tuple(value) if isinstance(value, list) else value
            flags[dotted] = Given(given, flag)
    path, own = args.config, list(base)
    resumed = getattr(args, "resume", None)
    resumed_folder = None if resumed == "auto" else run_folder(resumed)
    if resumed_folder is not None and (resumed_folder / "config.toml").is_file():
        # The run goes on in its own folder; its faults have had their day.
        own += [f"run.dir={toml_value(str(resumed_folder))}"]
        if path is None:
            path = resumed_folder / "config.toml"
            own += ["faults.specs=[]", 'faults.chaos="none"']
    return TrainConfig.load(
        path,
        overrides=[*own, *args.set],
        preset=args.preset,
        environment=args.environment,
        flags=flags,
        checks=[partial(_problems, check, needs_files=needs_files) for check in _CHECKS],
    )


def _problems(
    check: Callable[[TrainConfig], list[Problem]], config: TrainConfig, *, needs_files: bool
) -> list[Problem]:
    found = check(config)
    return found if needs_files else [p for p in found if p.key not in _FILES]


def in_ray_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is the driver of a submitted job: Ray tells it so."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment


def find_run(name: str) -> Path:
    """A run's folder: the one that is named, else the newest below ``runs/`` with that in its name.

    Raises:
        ConfigError: There is none.
    """
    place = Path(name).expanduser()
    if (place / "events.jsonl").is_file():
        return place
    pattern = f"*{glob.escape(place.name)}*/events.jsonl"
    found = [path.parent for home in homes() for path in home.glob(pattern)]
    if not found:
        raise ConfigError(f"no run {name}: neither {place}/events.jsonl nor runs/*{place.name}*")
    return max(found, key=lambda folder: (folder / "events.jsonl").stat().st_mtime)


def closing_line(summary: Summary) -> str:
    """What a run did, in one line."""
    parts = [
        f"done {plural(summary.steps, 'step')} in {seconds_text(summary.wall_s)}",
        f"loss {loss_text(summary.final_loss)}",
        f"goodput {count_text(summary.goodput_tokens_per_s)} tok/s",
        f"ETTR {summary.ettr:.3f}",
        f"{plural(summary.losses, 'node')} lost, {plural(summary.joins, 'join')}, "
        f"{plural(summary.steps_lost, 'step')} lost, PLT {summary.plt * 100:.2g} %",
    ]
    if summary.digest:
        parts.append(f"digest {summary.digest[:12]}")
    return "  ".join(parts)


def story(summary: Summary) -> list[str]:
    """What happened to each lost node, for the end of the demo."""
    lines = []
    for r in summary.recoveries:
        seen = "" if r.detect_s is None else f"detected after {r.detect_s:.3f} s, "
        back = "" if r.back_s is None else f"recovered (next committed step) after {r.back_s:.2f} s"
        moved = f"{bytes_text(r.bytes_moved)} moved ({plural(r.moves, 'expert')})"
        lines += [
            f"node {r.node} was lost in step {r.step}: {r.cause}",
            f"  {seen}{back}",
            f"  steps lost: {r.steps_lost}, {moved}, {plural(r.num_nodes, 'node')} went on",
        ]
        phases = "  ".join(f"{name} {seconds:.3f}" for name, seconds in r.phases.items())
        lines.append(f"  seconds by phase: {phases}")
    return lines


def result_json(result: Result, summary: Summary) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    return {
        "schema": 1,
        "run_id": result.run_id,
        "run_dir": str(result.run_dir),
        "status": result.status,
        "steps": result.steps,
        "final_loss": summary.final_loss,
        "goodput_tokens_per_s": summary.goodput_tokens_per_s,
        "ettr": summary.ettr,
        "plt": summary.plt,
        "steps_lost": summary.steps_lost,
        "state_digest": result.state_digest,
    }


def print_json(content: Mapping[str, Any]) -> None:
    """One object on stdout and nothing else."""
    json.dump(content, sys.stdout)
    sys.stdout.write("\n")


def say(line: str) -> None:
    """One line of prose, on stderr."""
    print(line, file=sys.stderr, flush=True)

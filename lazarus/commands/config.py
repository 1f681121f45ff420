"""``lazarus config``: what a configuration resolves to, and what there is to configure."""

from __future__ import annotations

import argparse
from dataclasses import fields

from lazarus.commands import runs
from lazarus.config.reference import reference
from lazarus.config.train_config import TrainConfig
from lazarus.config.values import toml_value


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two actions."""
    parser = subparsers.add_parser("config", help="show or explain the configuration")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="every value and where it was said")
    runs.add_config_options(show)
    runs.add_run_options(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(run=_show)
    explain = actions.add_parser("reference", help="every key, its type, default and meaning")
    explain.set_defaults(run=_reference)


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    return int(args.run(args))


def _show(args: argparse.Namespace) -> int:
    config = runs.load_config(args, needs_files=False)
    if args.json:
        content = config.to_dict() | {"schema": 1, "origins": dict(config.origins)}
        runs.print_json(content)
        return 0
    print("\n".join(shown(config)))
    return 0


def shown(config: TrainConfig) -> list[str]:
    """The complete file, with the origin of each value that is not a default; and time-outs."""
    lines, section = [], ""
    for line in config.to_toml().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        name = line.split(" = ")[0]
        origin = config.origins.get(f"{section}.{name}" if section else name)
        lines.append(f"{line}  # {origin}" if origin else line)
    derived = config.timeouts
    lines += ["", "# derived from recovery.tolerated_stall_s:"]
    for spec in fields(derived):
        lines.append(f"# {spec.name} = {toml_value(getattr(derived, spec.name))}")
    return lines


def _reference(args: argparse.Namespace) -> int:
    print(reference(), end="")
    return 0

"""``lazarus calibrate``: a cost model for ``lazarus simulate`` from records of real runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lazarus.commands import runs
from lazarus.record.events import read_events
from lazarus.simulate.studies.calibrate import calibrated


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "calibrate", help="costs of the simulator from real runs", description=__doc__
    )
    parser.add_argument("run_names", nargs="+", metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", metavar="FILE", help="write the profile (default: stdout)")


def run(args: argparse.Namespace) -> int:
    """Print the profile, or write it for ``lazarus simulate --profile FILE``."""
    folders = [runs.find_run(name) for name in args.run_names]
    costs = calibrated([read_events(folder) for folder in folders])
    if args.out:
        Path(args.out).write_text(costs.to_json(), encoding="utf-8")
        runs.say(f"profile of {len(folders)} runs in {args.out}")
    else:
        print(costs.to_json(), end="")
    return 0

"""``lazarus doctor``: is this machine fit for a run? Each line ok, warn or fail, with the fix."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lazarus.commands import runs
from lazarus.commands.machine_checks import examine


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("doctor", help="check this machine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a failure."""
    findings = examine(args.environment)
    if args.json:
        runs.print_json({"schema": 1, "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            print(finding)
    return int(any(f.level == "fail" for f in findings))

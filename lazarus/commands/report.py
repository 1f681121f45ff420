"""``lazarus report``: one self-contained page about a run, or several runs side by side."""

from __future__ import annotations

import argparse

from lazarus.commands import runs
from lazarus.errors import ConfigError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("report", help="draw a run", description=__doc__)
    parser.add_argument(
        "run_name", metavar="RUN_DIR", nargs="?", help="a run's folder, or its name"
    )
    parser.add_argument("--compare", nargs="+", metavar="RUN_DIR", help="runs side by side")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in RUN_DIR")
    parser.add_argument("--json", action="store_true", help="print where the page is as an object")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    from lazarus.report import compare_reports, write_report

    if bool(args.compare) == bool(args.run_name):
        raise ConfigError("give one RUN_DIR, or --compare with several")
    if args.compare:
        folders = [runs.find_run(name) for name in args.compare]
        made = compare_reports(folders, out=args.out or "comparison.html")
    else:
        made = write_report(runs.find_run(args.run_name), out=args.out)
    if args.json:
        runs.print_json({"schema": 1, "report": str(made), "bytes": made.stat().st_size})
    else:
        print(made)
    return 0

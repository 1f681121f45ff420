"""``lazarus status``: where a run stands, from its record."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from lazarus.commands import runs
from lazarus.record.endings import with_end
from lazarus.record.events import blamed_on_record, read_events
from lazarus.record.status import describe, status_of


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("status", help="where a run stands", description=__doc__)
    parser.add_argument("run_name", metavar="RUN", help="a run's folder, or part of its name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print one line, or one object."""
    folder = runs.find_run(args.run_name)
    with blamed_on_record(folder):
        status = status_of(with_end(read_events(folder), folder), now_s=time.time())
    if args.json:
        runs.print_json({"schema": 1, "run_dir": str(folder), **asdict(status)})
        return 0
    print(describe(status))
    return 0

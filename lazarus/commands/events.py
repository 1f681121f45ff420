"""``lazarus events``: the record of a run, as it is or as sentences, also while it grows."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lazarus.basics.careful import open_regular
from lazarus.basics.format import loss_text
from lazarus.commands import runs
from lazarus.console.narrator import Narrator
from lazarus.errors import ConfigError, RecordError
from lazarus.faults import seconds_of
from lazarus.record.endings import is_abandoned, with_end
from lazarus.record.events import FILE_NAME, blamed_on_record, decode_bytes, read_events

_POLL_S = 0.3


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("events", help="what happened in a run", description=__doc__)
    parser.add_argument("run_name", metavar="RUN", help="a run's folder, or part of its name")
    parser.add_argument("--follow", action="store_true", help="wait for more, until the run ends")
    parser.add_argument("--since", metavar="1h", help="only the last seconds, minutes or hours")
    parser.add_argument("--json", action="store_true", help="print the events themselves")


def run(args: argparse.Namespace) -> int:
    """Print the events that are asked for."""
    folder = runs.find_run(args.run_name)
    first_s = 0.0
    if args.since is not None:
        try:
            first_s = time.time() - seconds_of(args.since)
        except ValueError as error:
            raise ConfigError(f"--since {args.since}: {error}") from error
    narrator = Narrator()
    source: Iterator[Mapping[str, Any]]
    source = _following(folder) if args.follow else iter(with_end(read_events(folder), folder))
    for event in source:
        with blamed_on_record(folder):
            told = narrator.tell(event)
            lines = [json.dumps(event)] if args.json else _shown(event, told)
        if event["t"] >= first_s:
            for line in lines:
                print(line, flush=True)
    return 0


def _shown(event: Mapping[str, Any], lines: list[str]) -> list[str]:
    stamp = time.strftime("%H:%M:%S", time.localtime(float(event["t"])))
    name = event["event"]
    if name == "step_committed":
        text = f"step {event['step']:,}  loss {loss_text(event['loss'])}"
        lines = [f"{text}  {event['num_nodes']} nodes  {event['wall_s']:.2f} s"]
    elif not lines:
        rest = {k: v for k, v in event.items() if k not in ("t", "m", "event") and _short(v)}
        lines = [f"{name}  " + "  ".join(f"{k}={v}" for k, v in rest.items())]
    return [f"{stamp}  {line}" for line in lines]


def _short(value: Any) -> bool:
    return len(str(value)) <= 80


def _following(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Every whole line, now and later, until the last life of the run is over."""
    path, number, is_over = folder / FILE_NAME, 0, False
    with open_regular(path) as file:
        partial = b""
        while True:
            partial += file.readline()
            if partial.endswith(b"\n"):
                number += 1
                if not partial.strip():
                    partial = b""  # damage that was blanked
                    continue
                try:
                    event, partial = decode_bytes(partial), b""
                except ValueError as error:
                    raise RecordError(path=str(path), line=number, reason=str(error)) from error
                is_over = event["event"] == "run_finished"
                yield event
                continue
            if is_over:
                return
            if is_abandoned(folder) and not file.readline():
                yield from with_end(read_events(folder), folder)[-1:]
                return
            time.sleep(_POLL_S)

"""The command line as users start it: a process of its own, in a folder and home of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_runs import SMALL

from lazarus.record.events import read_events

PATIENCE_S = 240.0  # for a small run to come to a step on a loaded machine


@dataclass
class Shell:
    """Where commands are typed: a working folder, which is the home of its user too."""

    folder: Path

    def start(self, *arguments: str, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
        """``lazarus train`` on a small model."""
        options = [word for text in (*SMALL, *settings) for word in ("--set", text)]
        return subprocess.Popen(
            [sys.executable, "-m", "lazarus", "train", *options, *arguments],
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, *arguments: str, settings: Sequence[str] = ()) -> tuple[int, str]:
        """Run to the end. Returns its exit code and what it said."""
        process = self.start(*arguments, settings=settings)
        said, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, said

    def interrupted(self, *arguments: str, step: int, settings: Sequence[str] = ()) -> Path:
        """A run that got Ctrl-C once a step was committed. Returns its folder."""
        before = set(self.runs())
        process = self.start(*arguments, settings=settings)
        folder = wait_for(lambda: next(iter(set(self.runs()) - before), None), process)
        wait_for(lambda: last_step(folder) >= step, process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130, said
        return folder

    def runs(self) -> list[Path]:
        """Folders of runs that were given none."""
        return sorted((self.folder / "runs").glob("*"))


def wait_for(look: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What ``look`` finds, once it finds something; the process must not end before."""
    until = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "the run did not come that far"
        time.sleep(0.05)
    return found


def steps_of(folder: Path) -> list[int]:
    """Committed steps, in the record's order."""
    if not (folder / "events.jsonl").is_file():
        return []
    events = read_events(folder / "events.jsonl")
    return [event["step"] for event in events if event["event"] == "step_committed"]


def last_step(folder: Path) -> int:
    return max(steps_of(folder), default=0)

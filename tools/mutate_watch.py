"""A pytest plugin of ``mutate.py``: it chooses the tests, and says which one runs which line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]


class Lines:
    """Which lines of a folder's functions are run; each line costs the time of its first run."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._left: dict[int, tuple[CodeType, set[int], Trace]] = {}

    def start(self) -> None:
        self._left.clear()
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)

    def stop(self) -> set[tuple[str, int]]:
        """The lines that were run since the start, with their files."""
        threading.settrace(None)  # type: ignore[arg-type]
        sys.settrace(None)
        codes = list(self._left.values())
        return {(c.co_filename, n) for c, left, _ in codes for n in self._lines(c) - left}

    def _on_call(self, frame: FrameType, event: str, arg: object) -> Trace | None:
        code = frame.f_code
        known = self._left.get(id(code))
        if known is None:
            left = self._lines(code)

            def on_line(frame: FrameType, event: str, arg: object) -> Trace:
                left.discard(frame.f_lineno)
                return on_line

            known = self._left[id(code)] = (code, left, on_line)
        return known[2] if known[1] else None

    def _lines(self, code: CodeType) -> set[int]:
        if not code.co_filename.startswith(self._folder):
            return set()
        return {line for _, _, line in code.co_lines() if line}


class Watcher:
    """A pytest plugin: runs the chosen tests in their order, and says which one failed.

    ``bounds`` has the chosen tests with the most processor time of each, in seconds; a test that
    needs more ends the process by SIGPROF.

    Told to watch a folder, it notes which of its lines each test runs and how long that takes.
    """

    def __init__(self, pipe: int, *, without: Sequence[str], bounds: dict[str, float]) -> None:
        self.pipe = pipe
        self.without = without
        self.bounds = bounds
        self.order = {name: at for at, name in enumerate(bounds)}
        self.seconds: dict[str, float] = {}
        self.lines: Lines | None = None
        self.run_by: dict[tuple[str, int], list[str]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [i for i in items if not any(word in i.nodeid for word in self.without)]
        if self.order:
            items[:] = [i for i in items if i.nodeid in self.order]
            items.sort(key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.bounds.get(nodeid, 0.0))
        if self.lines is not None:
            self.lines.start()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        if self.lines is not None:
            for line in self.lines.stop():
                self.run_by[line].append(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.lines is not None and report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self._tell(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._tell(report)

    def _tell(self, report: Any) -> None:
        if self.pipe >= 0 and report.failed:
            os.write(self.pipe, report.nodeid.encode())
            self.pipe = -1

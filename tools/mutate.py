"""Do the tests notice? One small change at a time, drawn by seed, against a package's fast tests.

    python tools/mutate.py --package control --seed 1 --count 100

Each change is made in a copy of the tree. The fast tests that run the changed function run until
the first one fails, and the change is reported as noticed or survived. A survivor is a line that no
fast test explains: it wants a test, it can go, or it does the same either way. The exit code is 0
whatever survives.

The tests run in a process forked from this one, which has loaded the large libraries already, with
a bound on processor time, memory and wall time. They see the same examples every time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mutate_changes import Change, drawn

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 12 << 30
WALL_S = 1800.0
LIBRARIES = (
    "pytest", "hypothesis", "hypothesis.strategies", "msgspec", "numpy", "scipy.optimize",
    "highspy", "pulp", "xxhash", "safetensors.torch", "fsspec", "torch",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A package's sources and its fast tests; tests named in ``without`` are left out."""

    sources: str
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()


SUITES = {
    "control": Suite(
        sources="lazarus/control",
        tests=(
            "tests/unit/test_control_*.py",
            "tests/unit/test_replacing.py",
            "tests/unit/test_runtime_ledger.py",
            "tests/unit/test_rpc_codec.py",
            "tests/unit/test_step_measures.py",
            "tests/property/test_control_plays.py",
            "tests/property/test_healing_behind.py",
        ),
        without=(
            "test_a_broken_rule_is_caught",
            "test_every_change_of_state_that_happens",
            "test_silent_corruption_never_spreads",
            "test_no_interleaving_of_faults",
            *(f"while_loads_drift[{seed}]" for seed in (3, 4, 5)),
        ),
    ),
    "placement": Suite(
        sources="placement",
        tests=("tests/unit/test_placement_*.py", "tests/property/test_placement_*.py"),
    ),
    "dispatcher": Suite(
        sources="dispatcher",
        tests=("tests/unit/test_dispatcher_[!m]*.py", "tests/property/test_dispatcher_*.py"),
        without=("real_processes", "gloo", "shared memory", "test_dispatcher_shared.py"),
    ),
    "checkpoint": Suite(
        sources="lazarus/checkpoint",
        tests=("tests/unit/test_checkpoint_*.py", "tests/property/test_checkpoint_*.py"),
        without=("storage_idle_half_of_the_time",),
    ),
}


# ---- the tests, in a process of their own ------------------------------------------------------


class Watcher:
    """A pytest plugin: runs the chosen tests, the quick ones first, and says which one failed.

    Told to watch a folder, it notes which of its functions each test calls and how long that takes.
    """

    def __init__(self, pipe: int, *, without: Sequence[str], seconds: dict[str, float]) -> None:
        self.pipe = pipe
        self.without = without
        self.seconds = seconds
        self.folder = ""
        self.called: dict[str, set[str]] = defaultdict(set)
        self._test = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [i for i in items if not any(word in i.nodeid for word in self.without)]
        if self.seconds:
            items[:] = [i for i in items if i.nodeid in self.seconds]
            items.sort(key=lambda i: self.seconds[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid
        if self.folder:
            threading.setprofile(self._profile)
            sys.setprofile(self._profile)

    def pytest_runtest_logfinish(self) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.folder and report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self._tell(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._tell(report)

    def _tell(self, report: Any) -> None:
        if self.pipe >= 0 and report.failed:
            os.write(self.pipe, report.nodeid.encode())
            self.pipe = -1

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self.folder):
            code = frame.f_code
            self.called[f"{code.co_filename}:{code.co_firstlineno}"].add(self._test)


def _tests(tree: Path, suite: Suite, rounds: list[dict[str, float]], pipe: int) -> int:
    """Runs each round's tests, or without rounds all of them, and notes what they call."""
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() != ROOT / "tools")]
    os.environ |= {"PYTHONPATH": str(tree), "CI": "1"}
    for out in (1, 2):
        os.dup2(os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), out)
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
    for chosen in rounds or [{}]:
        files = sorted({name.split("::")[0] for name in chosen}) or _files(tree, suite)
        watcher = Watcher(pipe, without=suite.without, seconds=chosen)
        watcher.folder = "" if rounds else str(tree / suite.sources)
        code = int(pytest.main([*options, *files], plugins=[watcher]))
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return code
        if not rounds:
            _keep(tree, watcher)
    package = sys.modules.get(suite.sources.replace("/", "."))
    return 0 if package and Path(str(package.__file__)).is_relative_to(tree) else 99


def _files(tree: Path, suite: Suite) -> list[str]:
    found = {path for pattern in suite.tests for path in tree.glob(pattern)}
    return sorted(str(path.relative_to(tree)) for path in found)


def _keep(tree: Path, watcher: Watcher) -> None:
    called = {Path(at).relative_to(tree): sorted(tests) for at, tests in watcher.called.items()}
    known = {"seconds": watcher.seconds, "called": {str(at): t for at, t in called.items()}}
    (tree / "known.json").write_text(json.dumps(known))


@dataclass(kw_only=True)
class Run:
    """The tests of one change in a process of its own."""

    tree: Path
    pid: int
    pipe: int
    started_s: float = field(default_factory=time.monotonic)

    def result(self, *, wall_s: float) -> tuple[int, str, float] | None:
        """Exit status, first failed test and CPU seconds; None while it runs."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.started_s < wall_s:
                return None
            end_group(self.pid)
            _, status, usage = os.wait4(self.pid, 0)
        end_group(self.pid)
        with open(self.pipe, "rb") as pipe:
            failed = pipe.read().decode()
        code = os.waitstatus_to_exitcode(status)
        return code, failed or ("" if code == 0 else f"stopped, {code}"), usage.ru_utime


def end_group(pid: int) -> None:
    """Ends what the tests left behind, which would also keep the pipe open."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def started(tree: Path, suite: Suite, rounds: list[dict[str, float]], *, cpu_s: int) -> Run:
    """Without rounds nothing has changed, and compiled files are kept."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        sys.dont_write_bytecode = bool(rounds)
        os._exit(_tests(tree, suite, rounds, writing))
    os.close(writing)
    return Run(tree=tree, pid=pid, pipe=reading)


# ---- one change after the other ----------------------------------------------------------------


def copy_of_the_tree(folder: Path) -> Path:
    """The files that git knows and those that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the tests do without a change: seconds of each, and which call which function."""

    seconds: dict[str, float]
    called: dict[str, list[str]]
    cpu_s: float

    def rounds(self, change: Change) -> list[dict[str, float]]:
        """The tests that run a change, file by file: named for the module, then the quick ones."""
        names = self.called.get(f"{change.file}:{change.function}", [])
        files: dict[str, dict[str, float]] = defaultdict(dict)
        for name in names if change.function else self.seconds:
            files[name.split("::")[0]][name] = self.seconds.get(name, 0.0)
        stem = Path(change.file).stem
        ordered = sorted(files, key=lambda f: (stem not in f, sum(files[f].values()), f))
        return [files[name] for name in ordered]


def unchanged(suite: Suite, trees: list[Path]) -> Known:
    """The tests without a change; they have to pass."""
    for tree in trees:
        run = started(tree, suite, [], cpu_s=1200)
        while (result := run.result(wall_s=3600)) is None:
            time.sleep(0.05)
        code, failed, cpu_s = result
        if code != 0:
            print((tree / "output.txt").read_text()[-3000:])
            sys.exit(f"without a change the tests fail: {failed} (exit code {code})")
        known = Known(**json.loads((tree / "known.json").read_text()), cpu_s=cpu_s)
    return known


def changed(change: Change, tree: Path) -> bytes:
    """Makes the change, and returns what the file held before."""
    before = (tree / change.file).read_bytes()
    _write(tree / change.file, before[: change.start] + change.new.encode() + before[change.end :])
    return before


def _write(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink()


def results(
    changes: list[Change], suite: Suite, trees: list[Path], known: Known
) -> Iterator[tuple[Change, str, float]]:
    """Each change with the test that noticed it, or with nothing, as they end."""
    waiting, free = list(reversed(changes)), list(trees)
    going: list[tuple[Change, bytes, Run]] = []
    try:
        while waiting or going:
            while waiting and free:
                change = waiting.pop()
                if not (rounds := known.rounds(change)):
                    yield change, "", 0.0
                    continue
                tree = free.pop()
                before = changed(change, tree)
                cpu_s = 20 + int(2 * sum(sum(seconds.values()) for seconds in rounds))
                going.append((change, before, started(tree, suite, rounds, cpu_s=cpu_s)))
            time.sleep(0.05)
            for entry in list(going):
                change, before, run = entry
                if (result := run.result(wall_s=WALL_S)) is not None:
                    going.remove(entry)
                    _write(run.tree / change.file, before)
                    free.append(run.tree)
                    yield change, result[1], result[2]
    finally:
        for _, _, run in going:
            end_group(run.pid)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="lazarus-mutate-") as folder:
        trees = [copy_of_the_tree(Path(folder) / str(i)) for i in range(options.jobs)]
        sources = trees[0] / SUITES[options.package].sources
        every = drawn(sources, root=trees[0], seed=options.seed, count=options.count)
        only = {int(number) for number in options.only.split(",") if number}
        changes = {c: n for n, c in enumerate(every, 1) if not only or n in only}
        if options.list:
            for change, number in changes.items():
                print(f"{number:4} {change}")
            return
        suite = SUITES[options.package]
        if options.tests:
            suite = Suite(sources=suite.sources, tests=tuple(options.tests), without=suite.without)
        survived = _tried(changes, suite, trees)
        for kind, number in sorted(Counter(c.kind for c in changes).items()):
            print(f"{kind:12} {number - survived[kind]:4} of {number:4} noticed")
        noticed = f"{len(changes) - survived.total()} of {len(changes)} noticed"
        print(f"{options.package}, seed {options.seed}: {noticed}")


def _tried(changes: dict[Change, int], suite: Suite, trees: list[Path]) -> Counter[str]:
    """Prints each change's result as it comes; returns how many of each kind survived."""
    for name in LIBRARIES:
        __import__(name)
    known = unchanged(suite, trees)
    print(f"without a change: {known.cpu_s:.0f} s of CPU", flush=True)
    survived: Counter[str] = Counter()
    for change, noticed_by, spent_s in results(list(changes), suite, trees, known):
        survived[change.kind] += not noticed_by
        word = "noticed " if noticed_by else "SURVIVED"
        print(f"{changes[change]:4} {word} {spent_s:4.1f} s  {change}  {noticed_by}", flush=True)
    return survived


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", choices=SUITES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at a time")
    parser.add_argument("--only", default="", metavar="N,N", help="only these numbers of the draw")
    parser.add_argument("--tests", nargs="+", metavar="GLOB", help="these instead of the fast ones")
    parser.add_argument("--list", action="store_true", help="print the changes, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()

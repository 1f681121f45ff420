"""Do the tests notice? One small change at a time, drawn by seed, against a package's fast tests.

    python tools/mutate.py --package control --seed 1 --count 100

Each change is made in a copy of the tree. The fast tests that run the changed lines run until the
first one fails, and the change is reported as noticed or survived. A survivor is a line that no
fast test explains: it wants a test, it can go, or it does the same either way. The exit code is 0
whatever survives.

One run without a change comes first. It is traced, which makes it slow, and says which test runs
which line. A change of a line that no test runs survives at once.

The tests run in a process forked from this one, which has loaded the large libraries already, and
see the same examples every time. A change after which a test needs many times the processor time
that it needed before counts as noticed: it made a loop endless. On a machine with other work the
wall time says little, so a change that reaches the bound of the wall time is reported as undecided.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mutate_changes import Change, drawn
from mutate_watch import Lines, Watcher

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 12 << 30
CPU_BOUND = 5  # how much more processor time than without the change, beyond MARGIN_S
WALL_BOUND = 40
MARGIN_S = 15.0
ELSEWHERE = 99  # exit code of tests that loaded another package than the copy
UNCHANGED_S = 600.0  # what all fast tests of a package may take, traced
ROUNDS_S = (0.3, 2.0, math.inf)  # tests that take up to so long are run together
UNDECIDED = "no end within the bound of the wall time"
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
        tests=(
            "tests/unit/test_dispatcher_[!m]*.py",
            "tests/unit/test_model_experts.py",
            "tests/property/test_dispatcher_*.py",
            "tests/property/test_experts_*.py",
        ),
        without=(  # they start processes
            *("real_processes", "gloo", "shared memory", "test_dispatcher_shared.py"),
            *("test_overlapped_gradients", "that_do_not_return_in_time"),
        ),
    ),
    "checkpoint": Suite(
        sources="lazarus/checkpoint",
        tests=("tests/unit/test_checkpoint_*.py", "tests/property/test_checkpoint_*.py"),
        without=("storage_idle_half_of_the_time",),
    ),
}


# ---- the tests, in a process of their own ------------------------------------------------------


def _tests(tree: Path, suite: Suite, rounds: list[dict[str, float]], pipe: int) -> int:
    """Runs each round's tests, or without rounds all of them, and notes what they run."""
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() != ROOT / "tools")]
    os.environ |= {"PYTHONPATH": str(tree), "CI": "1"}
    for out in (1, 2):
        os.dup2(os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), out)
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=0"]
    for chosen in rounds or [{}]:
        files = sorted({name.split("::")[0] for name in chosen}) or _files(tree, suite)
        watcher = Watcher(pipe, without=suite.without, bounds=_bounds(chosen))
        watcher.lines = None if rounds else Lines(str(tree / suite.sources))
        code = int(pytest.main([*options, *files], plugins=[watcher]))
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return code
        if not rounds:
            _keep(tree, watcher)
    package = sys.modules.get(suite.sources.replace("/", "."))
    return 0 if package and Path(str(package.__file__)).is_relative_to(tree) else ELSEWHERE


def _bounds(before_s: dict[str, float]) -> dict[str, float]:
    return {name: MARGIN_S + CPU_BOUND * spent_s for name, spent_s in before_s.items()}


def _files(tree: Path, suite: Suite) -> list[str]:
    found = {path for pattern in suite.tests for path in tree.glob(pattern)}
    return sorted(str(path.relative_to(tree)) for path in found)


def _keep(tree: Path, watcher: Watcher) -> None:
    lines = {f"{Path(at).relative_to(tree)}:{n}": t for (at, n), t in watcher.run_by.items()}
    (tree / "known.json").write_text(json.dumps({"seconds": watcher.seconds, "run_by": lines}))


@dataclass(kw_only=True)
class Run:
    """The tests of one change in a process of its own."""

    tree: Path
    pid: int
    pipe: int
    wall_s: float
    started_s: float = field(default_factory=time.monotonic)

    def result(self) -> tuple[int, str, float] | None:
        """Exit status, first failed test and CPU seconds; None while it runs."""
        late = False
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() - self.started_s < self.wall_s:
                return None
            late = True
            end_group(self.pid)
            _, status, usage = os.wait4(self.pid, 0)
        end_group(self.pid)
        with open(self.pipe, "rb") as pipe:
            failed = pipe.read().decode()
        code = os.waitstatus_to_exitcode(status)
        if code in (-signal.SIGXCPU, -signal.SIGPROF):
            failed = f"no end within {usage.ru_utime:.0f} s of CPU"
        elif late:
            failed = failed or UNDECIDED
        elif code == ELSEWHERE:
            sys.exit("the tests did not load the copy of the package")
        return code, failed or ("" if code == 0 else f"stopped, {code}"), usage.ru_utime


def end_group(pid: int) -> None:
    """Ends what the tests left behind, which would also keep the pipe open."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def started(tree: Path, suite: Suite, rounds: list[dict[str, float]]) -> Run:
    """Without rounds nothing has changed, and compiled files are kept.

    A round has its tests in order, each with the seconds that it takes without a change.
    """
    before_s = sum(sum(chosen.values()) for chosen in rounds) if rounds else UNCHANGED_S
    cpu_s = int(MARGIN_S + CPU_BOUND * before_s)
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
    return Run(tree=tree, pid=pid, pipe=reading, wall_s=WALL_BOUND * (MARGIN_S + before_s))


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
    """What the tests do without a change: seconds of each, and which run which line."""

    seconds: dict[str, float]
    run_by: dict[str, list[str]]
    cpu_s: float

    def rounds(self, change: Change, *, longest_s: float = math.inf) -> list[dict[str, float]]:
        """The tests that run a change: the quick ones first, in each round the nearest first."""
        span = range(change.line, change.line + change.old.count("\n") + 1)
        names = {name for n in span for name in self.run_by.get(f"{change.file}:{n}", [])}
        rounds: list[list[tuple[bool, float, str]]] = [[] for _ in ROUNDS_S]
        stem = Path(change.file).stem
        for name in names if change.function else self.seconds:
            spent_s = self.seconds.get(name, 0.0)
            if spent_s <= longest_s:
                rounds[bisect_left(ROUNDS_S, spent_s)].append((stem not in name, spent_s, name))
        return [{name: spent_s for _, spent_s, name in sorted(r)} for r in rounds if r]


def unchanged(suite: Suite, trees: list[Path]) -> Known:
    """The tests without a change; they have to pass."""
    for tree in trees:
        run = started(tree, suite, [])
        while (result := run.result()) is None:
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
    changes: list[Change], suite: Suite, trees: list[Path], known: Known, *, longest_s: float
) -> Iterator[tuple[Change, str, float]]:
    """Each change with the test that noticed it, or with nothing, as they end."""
    waiting, free = list(reversed(changes)), list(trees)
    going: list[tuple[Change, bytes, Run]] = []
    try:
        while waiting or going:
            while waiting and free:
                change = waiting.pop()
                if not (rounds := known.rounds(change, longest_s=longest_s)):
                    yield change, "", 0.0
                    continue
                tree = free.pop()
                before = changed(change, tree)
                going.append((change, before, started(tree, suite, rounds)))
            time.sleep(0.05)
            for entry in list(going):
                change, before, run = entry
                if (result := run.result()) is not None:
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
        found = _tried(changes, suite, trees, longest_s=options.longest)
        for kind, number in sorted(Counter(c.kind for c in changes).items()):
            print(f"{kind:12} {found['noticed', kind]:4} of {number:4} noticed")
        noticed = sum(n for (word, _), n in found.items() if word == "noticed")
        print(f"{options.package}, seed {options.seed}: {noticed} of {len(changes)} noticed")


def _tried(
    changes: dict[Change, int], suite: Suite, trees: list[Path], *, longest_s: float
) -> Counter[tuple[str, str]]:
    """Prints each change's result as it comes; returns how many of each result and kind."""
    for name in LIBRARIES:
        __import__(name)
    known = unchanged(suite, trees)
    print(f"without a change: {known.cpu_s:.0f} s of CPU", flush=True)
    found: Counter[tuple[str, str]] = Counter()
    for change, noticed_by, spent_s in results(
        list(changes), suite, trees, known, longest_s=longest_s
    ):
        word = "noticed" if noticed_by else "SURVIVED"
        word = "undecided" if noticed_by == UNDECIDED else word
        found[word, change.kind] += 1
        print(f"{changes[change]:4} {word:9} {spent_s:4.1f} s  {change}  {noticed_by}", flush=True)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", choices=SUITES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="changes tried at a time")
    parser.add_argument("--only", default="", metavar="N,N", help="only these numbers of the draw")
    parser.add_argument("--tests", nargs="+", metavar="GLOB", help="these instead of the fast ones")
    parser.add_argument(
        "--longest", type=float, default=math.inf, metavar="S",
        help="leave out tests that take longer than this, traced: quicker, and some more survive",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the changes, run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()

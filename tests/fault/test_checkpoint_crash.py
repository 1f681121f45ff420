"""kill -9 at every point of file, manifest and retention: the previous checkpoint stays usable."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.store import find_checkpoints
from lazarus.checkpoint.files.verify import newest_usable, verify
from lazarus.checkpoint.testing import ToyState

TOY = ToyState()

# Runs in a process of its own: two checkpoints stand, a third (partial) and a retention follow.
VICTIM = """
import sys
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.store import load_manifest
from lazarus.checkpoint.testing import ToyState
from lazarus.runtime.keeper.process import kill_probe, kill_self
url, spec = sys.argv[1:]
probe = kill_probe(spec, kill=kill_self)
previous = load_manifest(url, 200)
ToyState().save(url, 300, experts=[(0, 0), (1, 1)], previous=previous, probe=probe)
retain(url, keep=1, probe=probe)
print("survived", flush=True)
"""

# Label and how often it comes, with the newest usable step after a kill there.
POINTS = [
    ("file.open", 3, 200),
    ("file.written", 3, 200),
    ("file.synced", 3, 200),
    ("file.renamed", 3, 200),
    ("manifest.open", 1, 200),
    ("manifest.written", 1, 200),
    ("manifest.synced", 1, 200),
    ("manifest.renamed", 1, 300),
    ("retention.start", 1, 300),
    ("retention.manifest_deleted", 2, 300),
    ("retention.file_deleted", 5, 300),
    ("retention.done", 1, 300),
]
CASES = [(f"{label}:{n}", step) for label, count, step in POINTS for n in sorted({1, count})]


def prepare(url: str) -> None:
    first = TOY.save(url, 100)
    TOY.save(url, 200, experts=[(0, 1), (1, 0)], previous=first)


def assert_readable(url: str, step: int) -> None:
    """Every tensor is that of the step its version names."""
    reader = CheckpointReader(url, newest_usable(url, check="sha256"))
    assert reader.manifest.step == step
    assert {n: t.tolist() for n, t in reader.dense().items()} == {
        n: t.tolist() for n, t in TOY.dense(step).items()
    }
    for layer, expert in TOY.all_experts():
        want = TOY.expert(layer, expert, reader.manifest.expert_step(layer, expert))
        got = reader.expert(layer, expert)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("spec", "step"), CASES)
def test_a_process_killed_at_any_point_leaves_a_usable_checkpoint(
    tmp_path: Path, spec: str, step: int, crash: CrashRunner
) -> None:
    url = str(tmp_path / "ck")
    prepare(url)
    assert crash(url, spec) == -signal.SIGKILL, "the kill must happen"
    assert verify(url).bad == ()
    assert_readable(url, step)
    # The next run finishes what the killed one began, on top of what it left.
    newest = newest_usable(url)
    TOY.save(url, 400, experts=[(0, 2)], previous=newest)
    retain(url, keep=1)
    assert verify(url).bad == ()
    assert verify(url).foreign == ()
    assert_readable(url, 400)
    assert [m.step for m in find_checkpoints(url).manifests] == [400]


def test_the_points_are_reached_and_a_run_without_kill_survives(
    tmp_path: Path, crash: CrashRunner
) -> None:
    url = str(tmp_path / "ck")
    prepare(url)
    assert crash(url, "") == 0
    assert_readable(url, 300)


class CrashRunner:
    """Forks victims from one prepared process, so that torch is imported once."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", FORKER, VICTIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, url: str, spec: str) -> int:
        """Run one victim; its exit code, negative for a signal."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{url}\t{spec}\n")
        self._server.stdin.flush()
        while not (line := self._server.stdout.readline()).startswith("exit "):
            assert line, "the forker died"
        return int(line.split()[1])

    def close(self) -> None:
        """End the forker."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)


FORKER = """
import os, sys
import lazarus.checkpoint.testing
import lazarus.checkpoint.files.retention
import lazarus.runtime.keeper.process
for line in sys.stdin:
    url, spec = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        sys.argv = ["victim", url, spec]
        code = 1
        try:
            exec(sys.argv and VICTIM_CODE, {"__name__": "victim"})
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    print("exit", os.waitstatus_to_exitcode(status), flush=True)
"""
FORKER = "import sys\nVICTIM_CODE = sys.argv[1]\n" + FORKER


@pytest.fixture(scope="module")
def crash() -> CrashRunner:
    runner = CrashRunner()
    yield runner
    runner.close()

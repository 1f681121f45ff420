"""A run under mixed faults from outside, for minutes: nothing is lost and nothing grows.

``LAZARUS_SOAK_S`` says how long each run lasts; the default is the short form that CI runs, and
``make soak`` takes ten minutes for each of the two checkpoint places.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
from fault_runs import SMALL
from outages import Place, object_store, small_disk

from lazarus.checkpoint.files.verify import newest_usable
from lazarus.data.sampler import step_sample_ids
from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal

SECONDS = float(os.environ.get("LAZARUS_SOAK_S", "90"))
NODES, BATCH, STALL_S = 4, 11, 5.0
OUTAGE_S = 30.0  # of the checkpoint place
CALM_STEPS = 15  # committed by all nodes between two faults
LOADED_KB = 48 << 10  # more in a controller that has written to the checkpoint place
PATIENCE_S = 120.0  # until all nodes are back after a fault, on a loaded machine
KINDS = ("kill", "stop", "pause", "controller", "frozen controller", "keeper")
SETTINGS = (
    *(text for text in SMALL if not text.startswith(("cluster.replace_lost", "checkpoint."))),
    f"cluster.nodes={NODES}",
    "cluster.min_nodes=2",
    f"recovery.tolerated_stall_s={STALL_S}",
    "checkpoint.every=20",
    "checkpoint.keep=2",
    "train.steps=1000000",
    "run.ledger=true",
    "metrics.report=false",
)

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(SECONDS + 400)]


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A checkpoint place that can fail."""
    if request.param == "disk":
        with small_disk(tmp_path / "disk", megabytes=32) as disk:
            yield disk
    else:
        with object_store() as store:
            yield store


def test_a_run_under_mixed_faults_loses_nothing_and_nothing_grows(
    place: Place, tmp_path: Path
) -> None:
    storm = Storm(place=place, folder=tmp_path, rng=Random(12))
    storm.start()
    try:
        storm.rage(SECONDS)
    finally:
        code = storm.end()

    events = read_events(tmp_path / "run")
    assert code == 130, storm.output()
    steps = [e["step"] for e in events if e["event"] == "step_committed"]
    assert steps == list(range(1, len(steps) + 1))
    ledger = {e["step"]: e["sample_ids"] for e in events if e["event"] == "ledger"}
    size = next(int(e["num_samples"]) for e in storm.journal() if e["kind"] == "resume")
    assert ledger == {t: step_sample_ids(0, t, BATCH, size).tolist() for t in steps}
    assert not [e for e in events if e["event"] == "ledger_mismatch"]
    assert storm.struck["outage"] >= 1
    assert all(storm.struck[kind] for kind in KINDS), storm.struck
    assert sum(e["event"] == "node_lost" for e in events) >= storm.struck["kill"]
    (end,) = [e for e in events if e["event"] == "run_finished"]
    assert (end["status"], end["cause"]) == ("stopped", "request")
    storm.assert_flat()
    storm.assert_nothing_left()


@dataclass
class Storm:
    """Starts a run as a user would, strikes it again and again, and watches what it holds."""

    place: Place
    folder: Path
    rng: Random
    process: subprocess.Popen[bytes] | None = None
    struck: Counter[str] = field(default_factory=Counter)
    rss_kb: dict[str, list[int]] = field(default_factory=lambda: {"driver": [], "controller": []})

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> None:
        """`lazarus train` with its temporary files in a folder that we can look into."""
        (self.folder / "tmp").mkdir()
        self.shared_before = set(os.listdir("/dev/shm"))
        settings = (*SETTINGS, f"run.dir={self.run}", f'checkpoint.url="{self.place.url}"')
        command = [sys.executable, "-m", "lazarus", "train"]
        for text in settings:
            command += ["--set", text]
        environment = os.environ | {"TMPDIR": str(self.folder / "tmp"), **self.place.environment}
        with (self.folder / "output").open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, cwd=self.folder
            )
        self.wait_until_calm()

    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-4000:]

    def rage(self, seconds: float) -> None:
        """One fault after the other, each when the last one is over; outages go on beside them."""
        until = time.monotonic() + seconds
        outage_until: float | None = None
        rounds = 0
        deck: list[str] = []
        while time.monotonic() < until or not all(self.struck[kind] for kind in KINDS):
            if outage_until is not None and time.monotonic() >= outage_until:
                self.place.heal()
                outage_until = None
            if outage_until is None and rounds % 4 == 1:
                self.place.fail()
                self.struck["outage"] += 1
                outage_until = time.monotonic() + OUTAGE_S
            deck = deck or self.rng.sample(KINDS, len(KINDS))
            kind = deck.pop()
            self.strike(kind)
            self.struck[kind] += 1
            rounds += 1
            self.wait_until_calm()
            self.measure()
        if outage_until is not None:
            self.place.heal()

    # ---- faults --------------------------------------------------------------------------------

    def strike(self, kind: str) -> None:
        node = self.rng.choice(sorted(self.nodes()))
        if kind == "kill":
            self.signal(self.nodes()[node], signal.SIGKILL)
        elif kind == "stop":
            self.signal(self.nodes()[node], signal.SIGSTOP)
        elif kind == "pause":
            pids = self.nodes()[node]
            self.signal(pids, signal.SIGSTOP)
            time.sleep(STALL_S / 5)  # the fault itself: shorter than what is tolerated
            self.signal(pids, signal.SIGCONT)
        elif kind == "keeper":
            keepers = [pid for pid in self.nodes()[node] if self.is_keeper(pid)]
            self.signal(keepers, signal.SIGKILL)
        else:
            number = signal.SIGKILL if kind == "controller" else signal.SIGSTOP
            self.signal([self.controller()], number)

    @staticmethod
    def signal(pids: list[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def nodes(self) -> dict[str, list[int]]:
        """Live processes of each node, as they register themselves."""
        found: dict[str, list[int]] = {}
        for path in (self.folder / "tmp").glob("lazarus-*/node-*/*"):
            if path.name.isdigit() and state_of(int(path.name)) not in ("", "Z", "X"):
                found.setdefault(path.parent.name, []).append(int(path.name))
        return {
            node: pids
            for node, pids in found.items()
            if any(not self.is_keeper(pid) for pid in pids)
        }

    @staticmethod
    def is_keeper(pid: int) -> bool:
        try:
            return b"lazarus.runtime.keeper.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def journal(self) -> list[dict[str, Any]]:
        return read_journal(self.run / "journal")

    def controller(self) -> int:
        return next(int(e["pid"]) for e in reversed(self.journal()) if e["kind"] == "term")

    # ---- waiting and watching ------------------------------------------------------------------

    def wait_until_calm(self) -> None:
        """All nodes have committed some steps together since now."""
        deadline = time.monotonic() + PATIENCE_S
        tail = Tail(self.run / "events.jsonl")
        tail.skip()
        calm = 0
        while calm < CALM_STEPS:
            assert self.process is not None and self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"not calm again: {self.struck}\n{self.output()}"
            for event in tail.news():
                if event["event"] == "step_committed":
                    calm = calm + 1 if event["num_nodes"] == NODES else 0
            time.sleep(0.05)  # between two looks at a file that another process writes

    def measure(self) -> None:
        assert self.process is not None
        for name, pid in (("driver", self.process.pid), ("controller", self.controller())):
            with suppress(OSError):
                self.rss_kb[name].append(rss_kb(pid))

    def end(self) -> int:
        """Ctrl-C, as a user would; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def assert_flat(self) -> None:
        """The last third of the measurements is where the first one was.

        Controllers come and go. One that has written a checkpoint has loaded what reaches the
        place, and holds about 40 MB more than one that has just begun.
        """
        for name, measured in self.rss_kb.items():
            third = len(measured) // 3
            assert third >= 1, f"too few measurements of the {name}"
            before, now = median(measured[:third]), median(measured[-third:])
            assert now <= 1.1 * before + LOADED_KB, f"{name}: {before} kB -> {now} kB"

    def assert_nothing_left(self) -> None:
        mark = f"TMPDIR={self.folder / 'tmp'}".encode()
        for pid in pids():
            if mark in environ_of(pid):  # such as multiprocessing's helpers: they end by themselves
                assert ends_within(pid, STALL_S), Path(f"/proc/{pid}/cmdline").read_bytes()
        assert list((self.folder / "tmp").glob("lazarus-*")) == []
        assert set(os.listdir("/dev/shm")) <= self.shared_before
        assert newest_usable_step(self.place) > 0
        if not self.place.url.startswith("s3"):
            assert list(Path(self.place.url).rglob("*.tmp")) == []


def newest_usable_step(place: Place) -> int:
    """Of the checkpoints that the run left, every file of it verified."""
    saved = {name: os.environ.get(name) for name in place.environment}
    os.environ.update(place.environment)
    try:
        return newest_usable(place.url, check="sha256").step
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Tail:
    """Whole new lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def skip(self) -> None:
        with suppress(FileNotFoundError):
            self._at = self._path.stat().st_size
            text = self._path.read_bytes()[: self._at]
            self._at = text.rfind(b"\n") + 1

    def news(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def ends_within(pid: int, seconds: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def environ_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def rss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0

"""A Ray head that a test starts and ends by its own processes, and books of what is left behind."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "LAZARUS_TEST_MARK"
# Small steps, a small batch; the stall is long because test machines are shared.
QUICK_RUN = (
    "model.layers=2",
    "model.dim=32",
    "model.heads=2",
    "model.seq_len=32",
    "train.global_batch=8",
    "checkpoint.every=0",
    "checkpoint.full_at_end=false",
    "recovery.tolerated_stall_s=30",
)


def quick_settings() -> list[str]:
    return [word for setting in QUICK_RUN for word in ("--set", setting)]


@dataclass(frozen=True)
class Books:
    """Every process that inherited one test's mark, whoever started it."""

    mark: str

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LAZARUS_"))}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            MARK: self.mark,
            **extra,
        }

    def alive(self) -> dict[int, str]:
        """Pid -> command line. Zombies hold nothing and do not count."""
        wanted = f"{MARK}={self.mark}".encode()
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (place / "environ").read_bytes().split(b"\0"):
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
            except OSError:  # ended meanwhile, or not ours
                continue
        return found

    def wait_until_empty(self, timeout_s: float) -> dict[int, str]:
        """What is left after the time-out; empty as soon as nothing is."""
        done = lambda: not self.alive()  # noqa: E731
        poll(done, timeout_s=timeout_s)
        return self.alive()

    def end_all(self) -> None:
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def poll(done: Callable[[], bool], *, timeout_s: float) -> bool:
    """Wait until ``done``; False: it did not come true in time."""
    deadline = time.monotonic() + timeout_s
    pause, _ = socket.socketpair()
    with pause, _:
        pause.settimeout(0.05)
        while time.monotonic() < deadline:
            if done():
                return True
            try:
                pause.recv(1)
            except TimeoutError:
                continue
    return done()


def free_ports(count: int) -> list[int]:
    """Ports below the ephemeral range and Ray's own worker ports that nobody listens on."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@dataclass
class RayHead:
    """``ray start --head --block`` with everything its own. Ended by pid, never by ``ray stop``."""

    folder: Path
    books: Books
    num_cpus: int
    ports: list[int] = field(default_factory=lambda: free_ports(6))
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def metrics_page(self) -> str:
        return f"http://127.0.0.1:{self.ports[5]}/metrics"

    @property
    def environment(self) -> dict[str, str]:
        return self.books.environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(self.folder / "token"),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
            HOME=str(self.folder),
        )

    def start(self) -> None:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        gcs, dashboard, client, agent, agent_grpc, metrics = self.ports
        self._ray(
            "--head",
            f"--port={gcs}",
            f"--temp-dir={self.folder / 't'}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}",
        )

    def add_node(self, num_cpus: int) -> subprocess.Popen[bytes]:
        """One more Ray node on this machine."""
        (agent,) = free_ports(1)
        self.num_cpus = num_cpus
        return self._ray(f"--address={self.address}", f"--dashboard-agent-listen-port={agent}")

    def _ray(self, *options: str) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *("--node-ip-address=127.0.0.1", "--object-store-memory=80000000"),
            f"--num-cpus={self.num_cpus}",
            *options,
        ]
        log = (self.folder / f"ray-{len(self.processes)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        self.processes.append(process)
        self.wait_for(len(self.processes) - 1, "Ray runtime started", timeout_s=180)
        return process

    def wait_for(self, index: int, text: str, *, timeout_s: float) -> None:
        path = self.folder / f"ray-{index}.log"
        seen = poll(lambda: text in path.read_text(errors="replace"), timeout_s=timeout_s)
        assert seen, path.read_text(errors="replace")[-2000:]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short name: Unix sockets below it must stay under 108 characters."""
    with tempfile.TemporaryDirectory(prefix="lzt-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def books(short_folder: Path) -> Iterator[Books]:
    kept = Books(mark=short_folder.name)
    try:
        yield kept
    finally:
        kept.end_all()


@pytest.fixture
def ray_head(short_folder: Path, books: Books) -> Iterator[RayHead]:
    head = RayHead(folder=short_folder, books=books, num_cpus=4)
    try:
        head.start()
        yield head
    finally:
        head.close()


@pytest.fixture
def ray_cluster(short_folder: Path, books: Books) -> Iterator[RayHead]:
    """A head and three more Ray nodes, one CPU each."""
    head = RayHead(folder=short_folder, books=books, num_cpus=1)
    try:
        head.start()
        for _ in range(3):
            head.add_node(1)
        yield head
    finally:
        head.close()


@pytest.fixture(name="poll")
def poll_function() -> Callable[..., bool]:
    return poll


@pytest.fixture
def quick() -> list[str]:
    """Options that make the tiny preset quick."""
    return quick_settings()

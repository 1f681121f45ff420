"""Three hosts that are network namespaces: own address, own ``ray start``; one loses its link."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lazarus.record.events import read_events

ROOT = Path(__file__).resolve().parents[2]
PORT = 26379
# Ray's own view of a silent machine; the run's own heartbeats do not wait for it.
HEALTH = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 5,
}
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed"),
]


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass
class Hosts:
    """Namespaces on one bridge. Names are short: interfaces have 15 letters at most."""

    tag: str
    count: int
    made: list[str] = field(default_factory=list)

    def name(self, index: int) -> str:
        return f"lz{self.tag}h{index}"

    def address(self, index: int) -> str:
        return f"10.213.77.{index + 1}"

    @property
    def bridge(self) -> str:
        return f"lz{self.tag}b"

    def up(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        lines = ["127.0.0.1 localhost"]
        lines += [f"{self.address(i)} {self.name(i)}" for i in range(self.count)]
        for index in range(self.count):
            name = self.name(index)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join([*lines, f"{self.address(index)} vm", ""]))
            ip("netns", "add", name)
            self.made.append(name)
            ip("link", "add", f"{name}o", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}o", "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def link(self, index: int, state: str) -> None:
        """ "down" cuts a host off at its switch; "up" heals it."""
        ip("link", "set", f"{self.name(index)}o", state)

    def pids(self, index: int) -> list[int]:
        return [int(word) for word in ip("netns", "pids", self.name(index), check=False).split()]

    def commands(self, index: int) -> list[str]:
        found = []
        for pid in self.pids(index):
            try:
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def down(self) -> None:
        for index, name in enumerate(self.made):
            for pid in self.pids(index):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
            ip("link", "del", f"{name}o", check=False)
        ip("link", "del", self.bridge, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts(tag=f"{os.getpid() % 10000}", count=3)
    try:
        try:
            made.up()
        except AssertionError as problem:
            pytest.skip(f"no network namespaces here: {problem}")
        yield made
    finally:
        made.down()


@dataclass
class Machines:
    """Ray on each host, and the run on the first."""

    hosts: Hosts
    books: Any
    folder: Path
    poll: Any
    started: int = 0

    @property
    def environment(self) -> dict[str, str]:
        environment: dict[str, str] = self.books.environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(self.folder / "token"),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
            HOME=str(self.folder),
        )
        return environment

    def on(self, index: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.hosts.name(index), *command],
                cwd=ROOT,
                env=self.environment,
                stdout=out,
                stderr=out,
            )

    def end_ray(self, index: int) -> None:
        """What is left of Ray on a host that the cluster has given up, by pid."""
        for pid in self.hosts.pids(index):
            os.kill(pid, signal.SIGKILL)
        assert self.poll(lambda: self.hosts.pids(index) == [], timeout_s=60)

    def ray(self, index: int) -> None:
        """``ray start`` on one host; the first is the head."""
        self.started += 1
        log = self.folder / f"ray-{self.started}.log"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"),
            *("--object-store-memory=80000000", f"--node-ip-address={self.hosts.address(index)}"),
        ]
        if index == 0:
            command += ["--head", f"--port={PORT}", f"--temp-dir={self.folder / 't'}"]
            command += ["--include-dashboard=false", "--system-config", json.dumps(HEALTH)]
        else:
            command += [f"--address={self.hosts.address(0)}:{PORT}"]
        process = self.on(index, command, log)
        text = "Ray runtime started"
        up = self.poll(
            lambda: text in log.read_text(errors="replace") or process.poll() is not None,
            timeout_s=240,
        )
        assert up and process.poll() is None, log.read_text(errors="replace")[-3000:]


def test_a_cut_link_is_survived_and_healing_it_disturbs_nothing(
    hosts: Hosts, books: Any, short_folder: Path, quick: list[str], poll: Any
) -> None:
    token = short_folder / "token"
    token.touch(mode=0o600)
    token.write_text("7" * 64)
    machines = Machines(hosts=hosts, books=books, folder=short_folder, poll=poll)
    for index in range(3):
        machines.ray(index)
    record = short_folder / "r"
    command = [sys.executable, "-m", "lazarus", "train", "configs/tiny.toml", *quick]
    command += ["--set", "recovery.tolerated_stall_s=10", "--nodes", "3", "--steps", "1000000"]
    command += ["--set", "placement.slots_per_node=8", "--run-dir", str(record)]
    log = short_folder / "run.log"
    run = machines.on(0, [*command, "--address", f"{hosts.address(0)}:{PORT}"], log)

    def events(kind: str) -> list[Any]:
        assert run.poll() is None, log.read_text()[-3000:]
        if not (record / "events.jsonl").exists():
            return []
        return [e for e in read_events(record) if e["event"] == kind]

    def trains_on(num_nodes: int) -> bool:
        last = events("step_committed")[-3:]
        return len(last) == 3 and all(e["num_nodes"] == num_nodes for e in last)

    assert poll(lambda: trains_on(3), timeout_s=300), log.read_text()[-3000:]
    assert any("WorkerActor" in line for line in hosts.commands(2))
    hosts.link(2, "down")
    assert poll(lambda: trains_on(2), timeout_s=120), events("node_lost")
    assert len(events("node_lost")) == 1

    hosts.link(2, "up")
    assert poll(lambda: not of_the_run(hosts.commands(2)), timeout_s=180), hosts.commands(2)
    before = len(events("step_committed"))
    assert poll(lambda: len(events("step_committed")) > before + 20, timeout_s=120)
    assert trains_on(2)
    assert len(events("node_lost")) == 1
    reasons = [e["reason"] for e in events("reconfigured")]
    assert [reason for reason in reasons if reason != "rebalance"] == ["node_lost"]

    machines.end_ray(2)
    machines.ray(2)
    assert poll(lambda: trains_on(3), timeout_s=240), log.read_text()[-3000:]
    assert [e["node"] for e in events("node_joined")][-1] == 3
    (driver,) = [p for p in hosts.pids(0) if b"lazarus\0train" in cmdline(p)]
    os.kill(driver, signal.SIGINT)
    assert run.wait(120) == 130, log.read_text()[-3000:]
    steps = [e["step"] for e in read_events(record) if e["event"] == "step_committed"]
    assert steps == list(range(1, len(steps) + 1))


def of_the_run(commands: Sequence[str]) -> list[str]:
    """Processes that belong to the run, not to Ray."""
    words = ("WorkerActor", "NodeActor", "lazarus.runtime.keeper.process")
    return [line for line in commands if any(word in line for word in words)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

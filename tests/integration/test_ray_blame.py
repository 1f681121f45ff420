"""Runs that share a cluster of four Ray nodes, lose processes and machines, and wait for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazarus.events import read_events

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
LONG_S = 240  # for what takes seconds on a machine of one's own


@dataclass
class Run:
    """One driver on the cluster, and what it leaves."""

    name: str
    folder: Path
    driver: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder / f"{self.name}.err").read_text(errors="replace")

    def of(self, kind: str) -> list[dict[str, Any]]:
        record = self.folder / self.name / "events.jsonl"
        return [e for e in read_events(record) if e["event"] == kind] if record.exists() else []

    def trains_with(self, nodes: int, *, after: int = 0) -> bool:
        """Whether a step beyond ``after`` was committed by so many nodes."""
        assert self.driver.poll() is None, self.said[-3000:]
        steps = self.of("step_committed")
        return any(e["step"] > after and e["num_nodes"] == nodes for e in steps)

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.of("step_committed")), default=0)

    def stop(self) -> None:
        self.driver.send_signal(signal.SIGINT)
        assert self.driver.wait(LONG_S) == 130, self.said[-3000:]
        steps = [e["step"] for e in self.of("step_committed")]
        assert steps == list(range(1, len(steps) + 1))


Start = Callable[..., Run]


@pytest.fixture
def start(ray_cluster: Any, quick: list[str], tmp_path: Path) -> Start:
    def go(name: str, *settings: str, nodes: int) -> Run:
        words = [word for setting in settings for word in ("--set", setting)]
        command = [
            *(sys.executable, "-m", "lazarus", "train", "configs/tiny.toml", *quick, *words),
            *("--nodes", str(nodes), "--steps", "100000", "--address", ray_cluster.address),
            *("--run-dir", str(tmp_path / name)),
        ]
        with (tmp_path / f"{name}.err").open("wb") as err:
            driver = subprocess.Popen(
                command,
                cwd=ROOT,
                env=ray_cluster.environment | {"RAY_ADDRESS": "", "LAZARUS_RUN": name},
                stdout=subprocess.DEVNULL,
                stderr=err,
            )
        return Run(name=name, folder=tmp_path, driver=driver)

    return go


def workers(head: Any) -> dict[int, int]:
    """Ranks of all runs on the cluster: pid -> pid of their raylet."""
    return {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for pid, line in head.books.alive().items()
        if "ray::WorkerActor" in line
    }


ASKED = """
import json, sys, ray
from ray.experimental.internal_kv import _internal_kv_get
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as channel
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print((_internal_kv_get(channel) or b"[]").decode())
"""


def asked_for(head: Any) -> int:
    """Machines that the autoscaler is asked for."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED, head.address],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=True,
    )
    asked: list[Mapping[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return len(asked)


def test_runs_share_a_cluster_wait_for_machines_and_forget_the_dead(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R1, R5, R6: two at once on four machines; requests add up; who comes too early waits."""
    one, two = start("one", nodes=2), start("two", nodes=2)
    assert poll(lambda: one.trains_with(2), timeout_s=LONG_S), one.said
    assert poll(lambda: two.trains_with(2), timeout_s=LONG_S), two.said
    both = one.step
    assert poll(lambda: one.trains_with(2, after=both), timeout_s=LONG_S), "they run side by side"
    assert len(set(workers(ray_cluster).values())) == 4, "each rank has a machine of its own"
    assert asked_for(ray_cluster) == 4

    three = start("three", nodes=2)
    assert poll(lambda: "0 CPUs free" in three.said, timeout_s=LONG_S), three.said
    assert "2 have no machine" in three.said
    two.driver.kill()
    two.driver.wait()
    assert poll(lambda: three.trains_with(2), timeout_s=LONG_S), three.said
    assert poll(lambda: asked_for(ray_cluster) == 4, timeout_s=LONG_S), "the dead one is forgotten"

    wait = ("cluster.quorum_timeout_s=3", "cluster.min_nodes=2")
    four = start("four", *wait, nodes=2)
    assert four.driver.wait(LONG_S) == 3, four.said
    assert "waiting for nodes: 0 are up, 2 have no machine" in four.said
    (end,) = four.of("run_finished")
    assert (end["status"], end["cause"]) == ("short", "node")
    three.stop()
    assert poll(lambda: asked_for(ray_cluster) == 2, timeout_s=LONG_S), "and who ends, too"
    one.stop()
    assert asked_for(ray_cluster) == 0
    assert not workers(ray_cluster)


def test_lost_ranks_and_machines_are_replaced_wherever_there_is_room(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R2, R3, R4: a rank dies, then machines; whatever is healthy never idles."""
    other = start("other", "placement.slots_per_node=8", nodes=1)
    assert poll(lambda: other.trains_with(1), timeout_s=LONG_S), other.said
    (busy,) = workers(ray_cluster)
    run = start("run", nodes=3)
    assert poll(lambda: run.trains_with(3), timeout_s=LONG_S), run.said

    mine = {pid: raylet for pid, raylet in workers(ray_cluster).items() if pid != busy}
    os.kill(min(mine), signal.SIGKILL)  # no other machine is free: it comes back where it was
    assert poll(lambda: len(run.of("node_joined")) == 1, timeout_s=LONG_S), run.said
    assert poll(lambda: run.trains_with(3, after=run.step), timeout_s=LONG_S), run.said

    other.stop()  # its machine was busy when the run began
    mine = workers(ray_cluster)
    head = ray_cluster.processes[0].pid
    lost = next(raylet for raylet in mine.values() if head not in ancestors(raylet))
    os.kill(lost, signal.SIGKILL)
    assert poll(lambda: len(run.of("node_joined")) == 2, timeout_s=LONG_S), run.said
    assert poll(lambda: run.trains_with(3, after=run.step), timeout_s=LONG_S), run.said
    assert lost not in workers(ray_cluster).values()
    assert not run.of("quorum_lost")
    run.stop()


def test_a_machine_that_does_not_answer_holds_nobody_up(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R7, R8: three of four begin; the fourth is tried again and comes in when it answers."""
    head = ray_cluster.processes[0].pid
    raylets = [pid for pid, line in ray_cluster.books.alive().items() if "raylet/raylet" in line]
    hung = next(pid for pid in raylets if head not in ancestors(pid))
    os.kill(hung, signal.SIGSTOP)
    run = start("run", "recovery.tolerated_stall_s=10", "cluster.min_nodes=3", nodes=4)
    try:
        assert poll(lambda: run.trains_with(3), timeout_s=2 * LONG_S), run.said
        assert poll(lambda: "3 are up, 1 has no machine" in run.said, timeout_s=LONG_S), run.said
    finally:
        os.kill(hung, signal.SIGCONT)
    run.stop()


def ancestors(pid: int) -> list[int]:
    """The processes that a process descends from."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found

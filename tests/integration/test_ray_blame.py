"""Runs that share a cluster of four Ray nodes, lose processes and machines, and wait for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_asked import asked_for

from lazarus.record.events import read_events

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

    def trains_with(
        self, nodes: int, *, after: int = 0, since: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether a step beyond ``after``, and later than an event, was committed by so many."""
        assert self.driver.poll() is None, self.said[-3000:]
        steps, since_s = self.of("step_committed"), 0.0 if since is None else since["m"]
        late = (e for e in steps if e["step"] > after and e["m"] > since_s)
        return any(e["num_nodes"] == nodes for e in late)

    @property
    def step(self) -> int:
        return max((e["step"] for e in self.of("step_committed")), default=0)

    def stop(self, *, within_s: float = LONG_S) -> None:
        self.driver.send_signal(signal.SIGINT)
        assert self.driver.wait(within_s) == 130, self.said[-3000:]
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
    assert len(asked_for(ray_cluster)) == 4

    three = start("three", nodes=2)
    assert poll(lambda: "2 have no machine" in three.said, timeout_s=LONG_S), three.said
    assert "0 CPUs free" in three.said
    two.driver.kill()
    two.driver.wait()
    assert poll(lambda: three.trains_with(2), timeout_s=LONG_S), three.said
    assert poll(lambda: len(asked_for(ray_cluster)) == 4, timeout_s=LONG_S), (
        "the dead one is forgotten"
    )

    wait = ("cluster.quorum_timeout_s=3", "cluster.min_nodes=2")
    four = start("four", *wait, nodes=2)
    assert four.driver.wait(LONG_S) == 3, four.said
    assert "waiting for nodes: 0 are up, 2 have no machine" in four.said
    (end,) = four.of("run_finished")
    assert (end["status"], end["cause"]) == ("short", "node")
    three.stop()
    assert poll(lambda: len(asked_for(ray_cluster)) == 2, timeout_s=LONG_S), "and who ends, too"
    one.stop()
    assert asked_for(ray_cluster) == []
    assert poll(lambda: not workers(ray_cluster), timeout_s=LONG_S), "its processes end, too"


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
    assert not run.of("expert_restored"), "one loss at a time: each expert lived on elsewhere"
    assert_floor_comes_back(run)
    run.stop()


def assert_floor_comes_back(run: Run) -> None:
    """R2: after each loss and the join that makes it good, no expert is below its floor."""
    losses, joins, plans = run.of("node_lost"), run.of("node_joined"), run.of("plan_adopted")
    for lost in losses:
        joined = next(e for e in joins if e["m"] > lost["m"])
        plan = next(e for e in plans if e["generation"] == joined["generation"])
        assert plan["floor"] >= plan["requested_floor"]
        print(f"floor {plan['floor']} again {plan['m'] - lost['m']:.0f} s after a loss")
        assert plan["m"] - lost["m"] < LONG_S


def test_a_rank_and_then_another_machine_are_lost_within_seconds(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R3: what lives is used again, though Ray calls the dead machine alive for 15 s more."""
    run = start("run", "cluster.min_nodes=3", nodes=4)
    assert poll(lambda: run.trains_with(4), timeout_s=LONG_S), run.said
    ranks = workers(ray_cluster)
    head = ray_cluster.processes[0].pid
    (died, first), *_, (_, second) = sorted(
        ranks.items(), key=lambda item: head not in ancestors(item[1])
    )
    os.kill(died, signal.SIGKILL)
    struck = time.monotonic()
    assert poll(lambda: time.monotonic() - struck > 3, timeout_s=4)
    struck = time.monotonic()
    os.kill(second, signal.SIGKILL)

    assert poll(lambda: len(run.of("node_lost")) == 2, timeout_s=LONG_S), run.said
    lost = run.of("node_lost")
    assert poll(lambda: run.trains_with(3, since=lost[-1]), timeout_s=LONG_S), run.said
    print(f"three nodes train again after {time.monotonic() - struck:.0f} s")
    left = set(ranks.values()) - {second}
    assert first in left
    assert poll(lambda: set(workers(ray_cluster).values()) == left, timeout_s=LONG_S)
    assert run.of("node_lost") == lost and lost[0]["node"] != lost[1]["node"]
    assert poll(lambda: "3 are up, 1 has no machine" in run.said, timeout_s=LONG_S), run.said
    run.stop(within_s=60)


def test_a_machine_that_dies_while_a_node_starts_on_it_is_a_start_that_failed(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R7: the actor of a node is bound to a machine that Ray knows to be dead."""
    head = ray_cluster.processes[0].pid
    raylets = [pid for pid, line in ray_cluster.books.alive().items() if "raylet/raylet" in line]
    dying = next(pid for pid in raylets if head not in ancestors(pid))
    os.kill(dying, signal.SIGSTOP)
    run = start("run", "cluster.min_nodes=3", nodes=4)
    assert poll(lambda: bool(workers(ray_cluster)), timeout_s=LONG_S), run.said
    os.kill(dying, signal.SIGKILL)
    assert poll(lambda: "a node did not start" in run.said, timeout_s=LONG_S), run.said
    ray_cluster.add_node(1)
    assert poll(lambda: run.trains_with(4), timeout_s=LONG_S), run.said
    print(run.said)
    assert not run.of("node_lost")
    run.stop()


def test_a_machine_that_does_not_answer_holds_nobody_up(
    ray_cluster: Any, start: Start, poll: Any
) -> None:
    """R3, R8: three of four begin, and the driver hears Ctrl-C while the fourth is waited for."""
    head = ray_cluster.processes[0].pid
    raylets = [pid for pid, line in ray_cluster.books.alive().items() if "raylet/raylet" in line]
    hung = next(pid for pid in raylets if head not in ancestors(pid))
    os.kill(hung, signal.SIGSTOP)
    run = start("run", "recovery.tolerated_stall_s=10", "cluster.min_nodes=3", nodes=4)
    try:
        assert poll(lambda: run.trains_with(3), timeout_s=2 * LONG_S), run.said
        assert poll(lambda: "3 are up, 1 has no machine" in run.said, timeout_s=LONG_S), run.said
        run.stop(within_s=60)
    finally:
        os.kill(hung, signal.SIGCONT)


def ancestors(pid: int) -> list[int]:
    """The processes that a process descends from."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found

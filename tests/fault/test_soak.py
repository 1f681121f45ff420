"""Thirty losses and thirty joins in one run: every step is committed, and nothing grows."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
from fault_runs import Watched, watch

LOSSES = JOINS = 30
LEAST, MOST = 4, 8
WARM_UP = 12  # changes before the first measurement counts
ANCHOR = "node-0"  # the survivor that is measured

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(600)]


def schedule(seed: int) -> list[str]:
    """A random order of losses and joins that keeps 4 to 8 nodes, starting at 6."""
    rng, nodes, left = Random(seed), 6, {"kill": LOSSES, "join": JOINS}
    order = []
    while any(left.values()):
        able = [k for k in left if left[k] and (nodes > LEAST if k == "kill" else nodes < MOST)]
        kind = rng.choice(able)
        left[kind] -= 1
        nodes += 1 if kind == "join" else -1
        order.append(kind)
    return order


@dataclass(frozen=True)
class Usage:
    """What one process holds; ``blocks`` are shared memory of exchanges, ``fds`` all the rest."""

    fds: int
    blocks: int
    threads: int
    rss_kb: int

    @staticmethod
    def of(pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        open_files = [_behind(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        blocks = sum("memfd:exchange" in name for name in open_files)
        return Usage(
            fds=len(open_files) - blocks,
            blocks=blocks,
            threads=int(fields["Threads"]),
            rss_kb=int(fields["VmRSS"].split()[0]),
        )


def _behind(path: Path) -> str:
    try:
        return str(path.readlink())
    except FileNotFoundError:  # closed since it was listed
        return ""


@dataclass
class Soak:
    """Makes the next change whenever the last one has become a committed step."""

    rng: Random
    order: list[str]
    expected: int = 6
    changes: int = 0
    used: dict[str, list[tuple[int, Usage]]] = field(
        default_factory=lambda: {"survivor": [], "controller": []}
    )

    def on_event(self, run: Watched, event: Mapping[str, Any]) -> None:
        if event["event"] != "step_committed" or event["num_nodes"] != self.expected:
            return
        if self.changes >= WARM_UP:
            self.measure(run)
        if not self.order:
            run.stop()
            self.expected = -1
            return
        self.changes += 1
        if self.order.pop(0) == "join":
            self.expected += 1
            run.start_node()
        else:
            self.expected -= 1
            self.kill(run)

    def measure(self, run: Watched) -> None:
        pids = {"survivor": min(run.pids(ANCHOR)), "controller": run.controller_pid()}
        for name, pid in pids.items():
            self.used[name].append((self.expected, Usage.of(pid)))

    def kill(self, run: Watched) -> None:
        living = [n for n in run.node_names() if n != ANCHOR and self.alive(run, n)]
        victim = self.rng.choice(living)
        run.signal(victim, signal.SIGKILL)

    @staticmethod
    def alive(run: Watched, node: str) -> bool:
        states = []
        for pid in run.pids(node):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
            except FileNotFoundError:
                continue
            states.append(stat.rpartition(")")[2].split()[0])
        return any(state not in ("Z", "X") for state in states)


def test_thirty_losses_and_thirty_joins_leave_nothing_behind(tmp_path: Path) -> None:
    soak = Soak(rng=Random(5), order=schedule(5))
    run = watch(tmp_path, nodes=6, steps=100_000, on_event=soak.on_event)

    assert len(run.of("node_lost")) == LOSSES
    assert len(run.of("node_joined")) == JOINS
    assert run.steps == list(range(1, len(run.steps) + 1))
    assert min(e["num_nodes"] for e in run.of("step_committed")) >= LEAST
    for name, measured in soak.used.items():
        assert len(measured) >= LOSSES, "too few measurements to say anything"
        assert_flat(name, measured)


def assert_flat(name: str, measured: list[tuple[int, Usage]]) -> None:
    """Sockets and threads at the same number of nodes, memory at any: within 5 % of the start."""
    half = len(measured) // 2
    for nodes in range(LEAST, MOST + 1):
        early = [usage for at, usage in measured[:half] if at == nodes]
        late = [usage for at, usage in measured[half:] if at == nodes]
        if len(early) < 2 or len(late) < 2:
            continue
        for what in ("fds", "threads"):
            before = median(getattr(usage, what) for usage in early)
            now = median(getattr(usage, what) for usage in late)
            assert now <= 1.05 * before + 1, f"{name}: {what} {before} -> {now} at {nodes} nodes"
        # How many blocks an exchange needs depends on who is late; a leak would add up to dozens.
        most, now = max(u.blocks for u in early), median(u.blocks for u in late)
        assert now <= 1.05 * most + 1, f"{name}: blocks {most} -> {now} at {nodes} nodes"
    third = len(measured) // 3
    before = median(usage.rss_kb for _, usage in measured[:third])
    now = median(usage.rss_kb for _, usage in measured[-third:])
    assert now <= 1.05 * before, f"{name}: memory {before} kB -> {now} kB"

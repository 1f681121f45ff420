"""A keeper that dies alone: training does not notice, and checkpoints go on with another one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fault_runs import Event, Watched, at_step, watch

KEEPER = b"lazarus.runtime.keeper.process"
VICTIM = "node-1"

pytestmark = pytest.mark.slow


def keeper_of(run: Watched, node: str) -> int | None:
    """The process that keeps the node's snapshots."""
    for pid in run.pids(node):
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and KEEPER in command.read_bytes():
            return pid
    return None


@pytest.mark.parametrize(
    "end", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_checkpoints_go_on_with_another_keeper_at_the_same_place(
    tmp_path: Path, end: signal.Signals
) -> None:
    """A4: also for one that is there and does nothing; nobody pauses for it again and again."""
    killed: list[int] = []
    seen: list[tuple[int, int]] = []  # the new keeper, and the step by which it was seen

    def kill(run: Watched) -> None:
        pid = keeper_of(run, VICTIM)
        assert pid is not None
        os.kill(pid, end)
        killed.append(pid)

    def follow(run: Watched, event: Event) -> None:
        if killed and not seen and event["event"] == "step_committed":
            pid = keeper_of(run, VICTIM)
            if pid not in (None, *killed):
                seen.append((pid, event["step"]))
        saved = event["event"] == "checkpoint_persisted"
        if seen and saved and event["step"] > seen[0][1]:
            run.stop()

    outcome = watch(
        tmp_path / "run",
        nodes=3,
        steps=100_000,
        settings=("checkpoint.every=10", "recovery.tolerated_stall_s=2"),
        acts=[at_step(15, kill)],
        on_event=follow,
    )

    assert killed
    assert seen, "the keeper was never replaced"
    saved = [event["step"] for event in outcome.of("checkpoint_persisted")]
    assert max(saved) > seen[0][1]
    assert len(outcome.of("reconfigured")) <= 3
    assert not outcome.of("node_lost", "generation_failed")
    assert outcome.steps == list(range(1, outcome.steps[-1] + 1))

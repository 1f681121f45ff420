"""What a run left, as a value."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lazarus import metrics
from lazarus.control.messages import RunOver
from lazarus.errors import LazarusError
from lazarus.events import read_events
from lazarus.records import StepRecord


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left. ``checkpoint`` is the URL of the last one."""

    run_id: str
    run_dir: Path
    status: Literal["finished", "stopped"]
    steps: int
    history: tuple[StepRecord, ...]
    final_loss: float
    goodput_tokens_per_s: float
    ettr: float
    plt: float
    state_digest: str
    checkpoint: str | None

    def state_dict(self) -> Mapping[str, Tensor]:
        """Model weights by name, read one by one from the last checkpoint.

        Raises:
            LazarusError: The run wrote no checkpoint.
        """
        if self.checkpoint is None:
            raise LazarusError("the run wrote no checkpoint; set checkpoint.full_at_end = true")
        from lazarus.checkpoint.reader import open_state_dict

        return open_state_dict(self.checkpoint)


def result_of(over: RunOver, *, run_id: str, run_dir: Path, url: str) -> Result:
    """The result of a run that ended well, from its record.

    Args:
        url: Where the run keeps its checkpoints.
    """
    events = read_events(run_dir / "events.jsonl")
    steps = metrics.committed_steps(events)
    history = tuple(_step_record(steps[step]) for step in sorted(steps))
    totals = json.loads(over.result)
    persisted = any(event["event"] == "checkpoint_persisted" for event in events)
    return Result(
        run_id=run_id,
        run_dir=run_dir,
        status="finished" if over.status == "finished" else "stopped",
        steps=int(totals["steps"]),
        history=history,
        final_loss=history[-1].loss if history else float("nan"),
        goodput_tokens_per_s=float(totals["goodput_tokens_per_s"]),
        ettr=float(totals["ettr"]),
        plt=float(totals["plt"]),
        state_digest=str(totals["state_digest"]),
        checkpoint=url if persisted else None,
    )


def _step_record(event: Mapping[str, Any]) -> StepRecord:
    loss = event["loss"]
    return StepRecord(
        step=int(event["step"]),
        loss=float("nan") if loss is None else float(loss),
        tokens=int(event["tokens"]),
        num_nodes=int(event["num_nodes"]),
        wall_s=float(event["wall_s"]),
    )


def leave_artifacts(run_dir: Path) -> None:
    """What readers of a finished run expect beside its record: expert loads and the report.

    Neither can fail a run, nor the other: a problem becomes one line.
    """
    for what, leave in (("expert loads", _leave_loads), ("report", _leave_report)):
        try:
            leave(run_dir)
        except Exception as problem:  # noqa: BLE001 - the run itself is over and well
            print(f"warning: no {what} of this run: {problem}", file=sys.stderr)


def _leave_loads(run_dir: Path) -> None:
    from lazarus.simulate.loads import counts_of_run, save_loads

    trace = counts_of_run(run_dir)
    if trace is not None:
        save_loads(run_dir / "expert_load.npz", trace.counts, steps=trace.steps)


def _leave_report(run_dir: Path) -> None:
    from lazarus.report import write_report

    if (run_dir / "events.jsonl").exists():
        write_report(run_dir)

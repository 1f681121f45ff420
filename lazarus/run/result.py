"""The result of a run, and the files made after its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lazarus.basics.format import bytes_of_text
from lazarus.control.messages import RunOver
from lazarus.errors import LazarusError
from lazarus.record.events import each_event
from lazarus.record.step_history import StepHistory
from lazarus.record.typed import StepRecord

if TYPE_CHECKING:
    from lazarus.checkpoint.files.reader import LazyState


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run that ended well.

    Attributes:
        run_id: Unique id of the run.
        run_dir: The run's folder, with its record.
        status: "finished", or "stopped" after a request to stop.
        steps: The last committed step.
        history: One ``StepRecord`` for each committed step.
        final_loss: Loss of the last committed step; NaN without one.
        goodput_tokens_per_s: Committed tokens per second of wall time.
        ettr: Productive time over wall time, in [0, 1].
        plt: Portion of lost tokens, in [0, 1].
        state_digest: Digest of the final state.
        checkpoint: URL of the run's checkpoints; None if none was written.
    """

    run_id: str
    run_dir: Path
    status: Literal["finished", "stopped"]
    steps: int
    history: Sequence[StepRecord]
    final_loss: float
    goodput_tokens_per_s: float
    ettr: float
    plt: float
    state_digest: str
    checkpoint: str | None

    def state_dict(self) -> Mapping[str, Tensor]:
        """Model weights by name, each read on access from the newest usable checkpoint.

        Raises:
            LazarusError: The run wrote no checkpoint.
        """
        return self._open()

    def save_pretrained(
        self,
        out: str | Path,
        *,
        like: str | Path | None = None,
        dtype: str | None = None,
        max_shard: str = "5GB",
    ) -> None:
        """Write the model as a Hugging Face checkpoint, as ``lazarus checkpoint export`` does.

        Of a model with adapters of peft, the adapters are written, in peft's format.

        Args:
            out: Folder or URL to write.
            like: Folder of the checkpoint that gives keys, shapes, dtypes and tokenizer files; by
                default the one that the run's model came from.
            dtype: bf16, fp16 or fp32 for all tensors; by default each has its dtype in ``like``.
            max_shard: Most bytes of a weight file, such as 5GB.

        Raises:
            LazarusError: The run wrote no checkpoint.
            ConfigError: ``like`` is no folder of this run's model.
            ValueError: ``dtype`` or ``max_shard`` is unknown.
        """
        from lazarus.checkpoint.files.tensors import dtype_named
        from lazarus.hf.saving import export_model

        export_model(
            self._open(),
            like=like,
            out=out,
            dtype=None if dtype is None else dtype_named(dtype),
            max_shard_bytes=bytes_of_text(max_shard),
        )

    def _open(self) -> LazyState:
        if self.checkpoint is None:
            raise LazarusError("the run wrote no checkpoint; set checkpoint.full_at_end = true")
        from lazarus.checkpoint.files.reader import open_state_dict

        return open_state_dict(self.checkpoint)


def result_of(over: RunOver, *, run_id: str, run_dir: Path, url: str) -> Result:
    """Make the result of a run that ended well, from its record.

    Args:
        over: The controller's message about the end.
        run_id: Unique id of the run.
        run_dir: The run's folder.
        url: Where the run keeps its checkpoints.
    """
    history, persisted = StepHistory(), False
    for event in each_event(run_dir / "events.jsonl"):
        if event["event"] == "step_committed":
            history.add(event)
        persisted = persisted or event["event"] == "checkpoint_persisted"
    totals = json.loads(over.result)
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


def leave_artifacts(run_dir: Path) -> None:
    """Write the expert loads and the report into the folder of a finished run.

    Errors are only printed; an error of one does not prevent the other.
    """
    for what, leave in (("expert loads", _leave_loads), ("report", _leave_report)):
        try:
            leave(run_dir)
        except Exception as problem:  # noqa: BLE001 - the run itself is over and well
            print(f"warning: no {what} of this run: {problem}", file=sys.stderr)


def _leave_loads(run_dir: Path) -> None:
    from lazarus.record.loads import counts_of_run, save_loads

    trace = counts_of_run(run_dir)
    if trace is not None:
        save_loads(run_dir / "expert_load.npz", trace.counts, steps=trace.steps)


def _leave_report(run_dir: Path) -> None:
    from lazarus.report import write_report

    if (run_dir / "events.jsonl").exists():
        write_report(run_dir)

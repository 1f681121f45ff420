"""The full checkpoint at the end of a run, to which each rank writes its share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lazarus.checkpoint.errors import StorageError
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.storage import redacted
from lazarus.checkpoint.files.store import Record, RecordKey, Tag, write_files
from lazarus.checkpoint.files.tensors import record_of, specs_of
from lazarus.checkpoint.format.manifest import FROZEN, PARTS, WrittenFile
from lazarus.control.messages import Finalize, Finalized, problem_of
from lazarus.runtime.saving.model_origin import origin_of
from lazarus.runtime.state.replica import Replica
from placement import Plan


class FinalWriter:
    """Writes this rank's share of the last checkpoint, with retries.

    Args:
        url: Where the run's checkpoints are.
        patience_s: How long to retry when storage refuses, and how long a write may make no
            progress.
        waiting: Called repeatedly meanwhile; may raise to give up.
    """

    def __init__(self, url: str, *, patience_s: float, waiting: Callable[[], None]) -> None:
        self._url, self._patience_s, self._waiting = url, patience_s, waiting
        self._moved = 0

    def write(
        self,
        order: Finalize,
        replica: Replica,
        plan: Plan,
        *,
        rank: int,
        size: int,
        tag: Tag,
        scalars: str,
    ) -> Finalized:
        """Write the experts whose home is this rank, and every ``size``-th dense tensor.

        Returns:
            The message for the controller; names the problem if storage refused.
        """
        started = time.monotonic()
        records = share_of(
            replica, plan, rank=rank, size=size, tag=tag, step=order.step, moved=self._waiting
        )
        url = order.url or self._url
        # A separate job name: a partial checkpoint of the same step may be in progress.
        own = replace(tag, job=f"{tag.job}-full")
        files, problem = "", None
        try:
            written = patiently(
                lambda: write_files(url, records, tag=own, progress=self._count),
                for_s=0.0 if order.url else self._patience_s,
                stuck_s=self._patience_s,
                waiting=self._waiting,
                moved=lambda: self._moved,
                place=redacted(url),
                operation="write",
            )
            files = json.dumps(share_report(replica, written, rank=rank, scalars=scalars))
        except StorageError as error:
            problem = problem_of(error)
        return Finalized(
            generation=order.generation,
            step=order.step,
            files=files,
            wall_s=time.monotonic() - started,
            url=order.url,
            num_bytes=sum(memoryview(c).nbytes for record in records for c in record.chunks),
            problem=problem,
        )

    def _count(self, num_bytes: int) -> None:
        self._moved += num_bytes


def share_of(
    replica: Replica,
    plan: Plan,
    *,
    rank: int,
    size: int,
    tag: Tag,
    step: int,
    moved: Callable[[], None] = lambda: None,
) -> list[Record]:
    """This rank's records of a full checkpoint. The tensors must not change until they are written.

    Args:
        replica: This rank's state.
        plan: Gives each expert's home.
        rank: This rank.
        size: Number of ranks.
        tag: Identifies the run and generation.
        step: The step of the state.
        moved: Called after every expert, to report progress: GPU copies take time.
    """
    records = [_dense_record(replica, rank=rank, size=size, tag=tag, step=step)]
    for layer in range(len(replica.layers)):
        for expert in range(replica.num_experts):
            if plan.home[layer, expert] == rank:
                records += _expert_records(replica, layer, expert, tag=tag, step=step)
                moved()
    return [record for record in records if record.specs]


def share_report(
    replica: Replica, files: Sequence[WrittenFile], *, rank: int, scalars: str
) -> dict[str, Any]:
    """JSON-able report of a written share, for the manifest; rank 0 adds what all ranks share."""
    report: dict[str, Any] = {"files": [file.to_json() for file in files]}
    if rank == 0:
        report |= {
            "layers": [layer_entry(replica, layer) for layer in range(len(replica.layers))],
            "dense_names": [name for name, _ in replica.dense_tensors()],
            "frozen_names": replica.frozen_names,
            "tied": replica.tied,
            "scalars": scalars,
            "history": replica.history.tolist(),
            "routed": replica.history[1].astype(int).tolist(),
            **origin_of(replica.model),
        }
    return report


def _dense_record(replica: Replica, *, rank: int, size: int, tag: Tag, step: int) -> Record:
    tensors = replica.dense_tensors()[rank::size]
    key = RecordKey(layer=-1, expert=rank, step=step, generation=tag.generation)
    return record_of(key, dict(tensors), tag=tag)


def _expert_records(
    replica: Replica, layer: int, expert: int, *, tag: Tag, step: int
) -> list[Record]:
    """An expert's trained parts in one record, and its frozen part in another."""
    found, records = list(replica.expert_parts(layer, expert)), []
    for parts in (PARTS, (FROZEN,)):
        key = RecordKey(
            layer=layer,
            expert=expert,
            step=step,
            generation=tag.generation,
            routed=int(replica.history[1, layer, expert]),
            parts=parts,
        )
        tensors = {name: tensor for part, name, tensor in found if part in parts}
        records.append(record_of(key, tensors, tag=tag))
    return records


def layer_entry(replica: Replica, layer: int) -> dict[str, Any]:
    """A manifest's entry for one MoE layer: path, number of experts, and tensors of an expert."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for part, name, tensor in replica.expert_names(layer):
        parts.setdefault(part, {})[name] = tensor
    return {
        "path": replica.layer_names[layer],
        "num_experts": replica.num_experts,
        "tensors": {
            part: [spec.to_json() for spec in specs_of(tensors)] for part, tensors in parts.items()
        },
    }

"""Routing traces: the experts chosen by each rank's tokens, as JSON lines; write, read, replay.

A line is ``{"step", "layer", "rank", "num_tokens", "topk", "top_indices"}``; ``top_indices`` holds
``num_tokens`` lists of ``topk`` expert ids, -1 for a copy that was not sent.

Shapes: T tokens, K choices per token, E experts, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispatcher.dispatcher import Dispatched, Dispatcher
from dispatcher.errors import DispatchError
from dispatcher.splits.routing import IntArray

_KEYS = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")


class TraceError(DispatchError, ValueError):
    """A line of a trace is invalid; the message names file and line."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """The experts that one rank's tokens chose in one layer of one step, int64 [T, K]."""

    step: int
    layer: int
    rank: int
    expert_TK: Tensor

    def line(self) -> str:
        """Return the record as one line of JSON."""
        num_tokens, top_k = self.expert_TK.shape
        values = (self.step, self.layer, self.rank, num_tokens, top_k, self.expert_TK.tolist())
        return json.dumps(dict(zip(_KEYS, values, strict=True)), separators=(",", ":"))


def write_trace(path: str | Path, records: Iterable[RoutingRecord]) -> int:
    """Write the records to a file, one per line, and return their number."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.line() + "\n")
            count += 1
    return count


def read_trace(path: str | Path) -> Iterator[RoutingRecord]:
    """Yield the records of a trace file, read line by line.

    Raises:
        TraceError: A line is not JSON, lacks a key, or has inconsistent numbers.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _record(line, where=f"{path}:{number}")


def counts_of(records: Iterable[RoutingRecord], *, num_ranks: int, num_experts: int) -> IntArray:
    """Return the copies that each rank routes to each expert, summed over the records, [R, E].

    Raises:
        TraceError: A record names a rank or an expert outside the given numbers.
    """
    counts_RE = np.zeros((num_ranks, num_experts), dtype=np.int64)
    for record in records:
        chosen = record.expert_TK[record.expert_TK >= 0].numpy()
        if not 0 <= record.rank < num_ranks or chosen.max(initial=0) >= num_experts:
            raise TraceError(
                f"step {record.step} layer {record.layer}: rank {record.rank} of {num_ranks}, "
                f"expert {chosen.max(initial=0)} of {num_experts}"
            )
        counts_RE[record.rank] += np.bincount(chosen, minlength=num_experts)
    return counts_RE


def replay(
    records: Iterable[RoutingRecord], dispatcher: Dispatcher, *, dim: int
) -> Iterator[Dispatched]:
    """Dispatch tokens of zeros with the choices recorded for this rank, and yield each result.

    Collective: all ranks must replay the same number of records. A result may be combined before
    the next one is requested.

    Args:
        records: Records of any ranks; those of other ranks are skipped.
        dispatcher: Dispatcher of this rank.
        dim: Width of the tokens.
    """
    for record in records:
        if record.rank == dispatcher.table.rank:
            x_TD = torch.zeros(record.expert_TK.shape[0], dim)
            yield dispatcher.dispatch(x_TD, record.expert_TK)


def _record(line: str, *, where: str) -> RoutingRecord:
    try:
        raw: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not JSON: {error.msg}") from error
    missing = [key for key in _KEYS if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise TraceError(f"{where}: no {missing[0]!r}; a record has {', '.join(_KEYS)}")
    step, layer, rank, *shape = (_integer(raw[key], key, where=where) for key in _KEYS[:5])
    if shape[0] < 0 or shape[1] < 1:
        raise TraceError(f"{where}: {shape[0]} tokens of {shape[1]} choices; at least 0 and 1")
    try:
        expert_TK = torch.tensor(raw["top_indices"], dtype=torch.int64).reshape(shape)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TraceError(f"{where}: top_indices are not {shape[0]} x {shape[1]} ids") from error
    return RoutingRecord(step=step, layer=layer, rank=rank, expert_TK=expert_TK)


def _integer(value: Any, key: str, *, where: str) -> int:
    try:
        return int(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{where}: {key} is {value!r}, not an integer") from error

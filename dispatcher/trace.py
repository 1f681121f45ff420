"""Routing traces: what each rank's tokens chose, as JSON lines, out of a run and back into one.

A line is ``{"step", "layer", "rank", "num_tokens", "topk", "top_indices"}``; ``top_indices`` holds
``num_tokens`` lists of ``topk`` expert ids, -1 for a copy that went nowhere.

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
    """A line of a trace is not what it should be; the message has file and line."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """The choices of one rank's tokens in one layer of one step."""

    step: int
    layer: int
    rank: int
    expert_TK: Tensor

    def line(self) -> str:
        """The record as one line of JSON, keys in their fixed order."""
        num_tokens, top_k = self.expert_TK.shape
        values = (self.step, self.layer, self.rank, num_tokens, top_k, self.expert_TK.tolist())
        return json.dumps(dict(zip(_KEYS, values, strict=True)), separators=(",", ":"))


def write_trace(path: str | Path, records: Iterable[RoutingRecord]) -> int:
    """Write the records, one a line, and return how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.line() + "\n")
            count += 1
    return count


def read_trace(path: str | Path) -> Iterator[RoutingRecord]:
    """Read a trace line by line.

    Raises:
        TraceError: A line is no JSON, lacks a key, or its numbers do not fit each other.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _record(line, where=f"{path}:{number}")


def counts_of(records: Iterable[RoutingRecord], *, num_ranks: int, num_experts: int) -> IntArray:
    """Copies that each rank routes to each expert, summed over the records, [R, E].

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
    """Send tokens of zeros where the records of this dispatcher's rank sent theirs.

    All ranks must replay equally many records. Each result may be combined before the next.

    Args:
        records: Of any ranks; those of others are skipped.
        dispatcher: Of this rank.
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

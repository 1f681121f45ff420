"""Traces of routing: read as written, replayed on their rank, and refused if they are odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dispatcher import (
    Dispatcher,
    RoutingTable,
)
from dispatcher.exchange import SoloExchange
from dispatcher.trace import RoutingRecord, TraceError, counts_of, read_trace, replay, write_trace


def record(rank: int, ids: list[list[int]]) -> RoutingRecord:
    chosen = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), -1)
    return RoutingRecord(step=4, layer=1, rank=rank, expert_TK=chosen)


def test_a_trace_is_read_as_it_was_written_and_replayed_on_its_rank(tmp_path: Path) -> None:
    written = [record(0, [[0, 2], [1, -1]]), record(1, [[2, 2]])]
    path = tmp_path / "trace.jsonl"
    assert write_trace(path, written) == 2
    path.write_text(path.read_text() + "\n")
    found = list(read_trace(path))
    assert [(r.step, r.layer, r.rank) for r in found] == [(4, 1, 0), (4, 1, 1)]
    assert all(torch.equal(a.expert_TK, b.expert_TK) for a, b in zip(found, written, strict=True))
    assert counts_of(found, num_ranks=2, num_experts=3).tolist() == [[1, 1, 1], [0, 0, 2]]
    only = Dispatcher(RoutingTable.solo(3), exchange=SoloExchange())
    (dispatched,) = replay(found, only, dim=5)
    assert dispatched.rows_MD.shape == (3, 5)
    for odd in (record(2, [[0]]), record(-1, [[0]]), record(0, [[3]])):
        with pytest.raises(TraceError, match="step 4 layer 1: rank"):
            counts_of([odd], num_ranks=2, num_experts=3)
    assert not counts_of([record(1, [[-1]])], num_ranks=2, num_experts=3).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0, "top_indices": []}, ""),
        ({"num_tokens": -1}, "at least 0 and 1"),
        ({"topk": 0, "top_indices": [[], []]}, "2 tokens of 0 choices"),
        ({"top_indices": [[0], [1], [2]]}, "top_indices are not 2 x 1 ids"),
        ({"top_indices": "many"}, "top_indices are not"),
        ({"rank": "first"}, "rank is 'first', not an integer"),
        ({"layer": None}, "layer is None"),
    ],
)
def test_a_line_of_a_trace_at_its_bounds(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    line = {"step": 1, "layer": 0, "rank": 0, "num_tokens": 2, "topk": 1,
            "top_indices": [[0], [1]]}  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("\n" + json.dumps(line | change))
    if not message:
        assert next(iter(read_trace(path))).expert_TK.shape == (0, 1)
        return
    with pytest.raises(TraceError, match=rf"trace.jsonl:2: .*{message}"):
        list(read_trace(path))
    for text in ("[1]", "{}", "{"):
        path.write_text(text)
        with pytest.raises(TraceError, match="no 'step'; a record has step, layer|not JSON"):
            list(read_trace(path))

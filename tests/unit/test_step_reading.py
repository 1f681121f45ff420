"""Samples as a rank reads them: by index, as a function, as a stream; ahead, never twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from dispatcher import Exchange, run_ranks
from lazarus.data.sampler import step_sample_ids
from lazarus.errors import DataError
from lazarus.runtime.input.positions import decoded_positions, encoded_positions
from lazarus.runtime.input.reader import POSITIONS_EVERY, Reading, open_reading
from lazarus.runtime.input.sources import RankPlace

SEED, BATCH = 3, 10


class Numbers:
    """Map-style; item i is i. Remembers what was read."""

    def __init__(self, size: int = 23) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Function:
    """Pure; remembers nothing."""

    def batch(self, step: int, sample_ids: Sequence[int]) -> tuple[int, list[int]]:
        return step, [int(i) for i in sample_ids]


class Shards:
    """A stream; item k of shard i is (i, k). Counts what was really read."""

    def __init__(self) -> None:
        self.reads = 0

    def shard(self, i: int, of: int, /) -> ShardReader:
        return ShardReader(self, i)


class ShardReader:
    def __init__(self, source: Shards, number: int) -> None:
        self.source, self.number, self.place = source, number, torch.tensor(0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[int, int]:
        self.source.reads += 1
        self.place = self.place + 1
        return self.number, int(self.place) - 1

    def state_dict(self) -> Mapping[str, Any]:
        return {"place": self.place, "note": ("a", [1, None])}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        assert state["note"] == ("a", [1, None])
        self.place = state["place"]


class Endless(IterableDataset[int]):
    """A torch stream that nobody could resume."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def reading_of(data: Any, *, prefetch_steps: int = 0, num_shards: int = 4) -> Reading:
    return open_reading(
        data,
        collate=list,
        seed=SEED,
        global_batch=BATCH,
        num_shards=num_shards,
        prefetch_steps=prefetch_steps,
    )


def seated(reading: Reading, *, rank: int = 0, size: int = 1, committed: int = 0) -> Reading:
    reading.seat(RankPlace(rank=rank, size=size, committed=committed))
    return reading


def test_indexed_data_is_shared_sample_by_sample() -> None:
    got = []
    for rank in range(3):
        reading = seated(reading_of(Numbers()), rank=rank, size=3)
        shared = reading.share(2)
        assert shared.sizes == (4, 3, 3)
        got += reading.batch(2, first=0, size=shared.sizes[rank])
    assert got == step_sample_ids(SEED, 2, BATCH, 23).tolist()


def test_a_pure_function_without_a_size_gets_numbers_without_end() -> None:
    reading = seated(reading_of(Function()), rank=1, size=2)
    assert reading.num_samples == 0
    assert reading.batch(3, first=0, size=5) == (3, [25, 26, 27, 28, 29])
    assert reading.batch(3, first=2, size=1) == (3, [27])


def test_a_batch_that_stands_in_for_none_has_the_form_of_one_sample() -> None:
    assert len(seated(reading_of(Numbers())).batch(1, first=0, size=0)) == 1
    stream = seated(reading_of(Shards()), rank=5, size=6)
    assert stream.share(1).sizes[5] == 0
    assert len(stream.batch(1, first=0, size=0)) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Numbers(0), "empty"),
        (object(), "no data source"),
        (Endless(), "shard\\(i, of\\)"),
    ],
)
def test_other_data_is_refused_with_the_way_out(data: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        reading_of(data)


def test_a_shuffle_buffer_is_refused_with_the_way_out() -> None:
    class BufferShuffledExamples:
        pass

    class Shuffled:
        _ex_iterable = BufferShuffledExamples()

    with pytest.raises(DataError, match="data.shuffle_shards = true"):
        reading_of(Shuffled())


def test_data_of_another_size_is_refused_by_a_joiner() -> None:
    state = reading_of(Numbers(23)).state()
    reading_of(Numbers(23)).take_state(state)
    with pytest.raises(DataError, match="24 samples here and 23 in the run"):
        reading_of(Numbers(24)).take_state(state)
    with pytest.raises(DataError, match="num_shards=5, but the run reads 4"):
        reading_of(Shards(), num_shards=5).take_state(reading_of(Shards()).state())


def test_read_ahead_gives_what_reading_now_gives_and_is_not_consumed() -> None:
    now, ahead = seated(reading_of(Shards())), seated(reading_of(Shards(), prefetch_steps=2))
    for step in range(1, 8):
        parts = []
        for reading in (now, ahead):
            parts.append(
                [reading.batch(step, first=0, size=6), reading.batch(step, first=6, size=4)]
            )
            reading.read_ahead(step, lambda shared: (6, 4))
        assert parts[0] == parts[1]
        if step == 3:  # the step is redone by the same reader at the same place
            for reading in (now, ahead):
                seated(reading, committed=2)
            assert ahead.batch(3, first=0, size=6) == parts[0][0]
        for reading in (now, ahead):
            reading.committed(step)
            consumed = {s: p[0] for s, p in reading.state()["shards"].items()}
            assert sum(consumed.values()) == step * BATCH
    ahead.close()


def test_data_that_draws_random_numbers_is_reseeded_and_never_read_ahead() -> None:
    class Noisy(Numbers):
        def __getitem__(self, index: int) -> Any:
            super().__getitem__(index)
            return float(torch.rand(())), float(np.random.rand()), random.random()

    noisy = Noisy()
    reading = seated(reading_of(noisy, prefetch_steps=2))
    first = reading.batch(1, first=0, size=5)
    reading.read_ahead(1, lambda shared: (5, 5))
    assert len(noisy.read) == 5
    torch.manual_seed(1)
    assert reading.batch(1, first=0, size=5) == first  # a redo draws the same
    assert reading.batch(1, first=5, size=5) != first
    reading.close()


def test_errors_of_reading_ahead_reach_the_step_that_needs_the_samples() -> None:
    class Broken(Numbers):
        def __getitem__(self, index: int) -> int:
            if index in step_sample_ids(SEED, 2, BATCH, 23)[:1]:
                raise OSError("disk is gone")
            return index

    reading = seated(reading_of(Broken(), prefetch_steps=1))
    reading.batch(1, first=0, size=BATCH)
    reading.read_ahead(1, lambda shared: (BATCH,))
    with pytest.raises(OSError, match="disk is gone"):
        reading.batch(2, first=0, size=BATCH)
    reading.close()


def test_the_shards_of_a_dead_reader_go_on_from_the_last_exchange() -> None:
    last = POSITIONS_EVERY + 5

    def body(exchange: Exchange) -> tuple[list[Any], int]:
        source = Shards()
        reading = seated(reading_of(source, num_shards=6), rank=exchange.rank, size=exchange.size)
        for step in range(1, last + 1):
            reading.exchange_state(step, exchange, device=torch.device("cpu"))
            for first in range(len(reading.share(step).mine)):
                reading.batch(step, first=first, size=1)
            reading.committed(step)
        source.reads = 0
        if exchange.rank == 2:  # dies
            return [], 0
        survivor = seated(reading, rank=exchange.rank, size=2, committed=last)
        again = [
            item
            for step in (last + 1, last + 2)
            for item in survivor.batch(step, first=0, size=len(survivor.share(step).mine))
        ]
        return again, source.reads

    results = run_ranks(body, size=3)
    items = sorted(item for again, _ in results for item in again)
    numbers = range(last * BATCH, (last + 2) * BATCH)
    assert items == sorted((n % 6, n // 6) for n in numbers)
    # Reopened at a state at most as old as the exchange, not at the beginning.
    most = 2 * BATCH + (last - POSITIONS_EVERY + 2) * BATCH
    assert sum(reads for _, reads in results) <= most


def test_a_joiner_and_a_resumed_run_read_on_from_json() -> None:
    reading = seated(reading_of(Shards()))
    for step in (1, 2, 3):
        reading.batch(step, first=0, size=BATCH)
        reading.committed(step)
    state = reading.state()
    positions = decoded_positions(state["shards"])
    assert encoded_positions(positions) == state["shards"]
    joiner = reading_of(Shards())
    joiner.take_state(state)
    seated(joiner, committed=3)
    assert joiner.batch(4, first=0, size=BATCH) == reading.batch(4, first=0, size=BATCH)


def test_a_state_that_is_not_plain_is_refused() -> None:
    class Odd(ShardReader):
        def state_dict(self) -> Mapping[str, Any]:
            return {"file": object()}

    class OddShards(Shards):
        def shard(self, i: int, of: int, /) -> ShardReader:
            return Odd(self, i)

    reading = seated(reading_of(OddShards()))
    reading.batch(1, first=0, size=BATCH)
    with pytest.raises(DataError, match="made of JSON values and tensors"):
        reading.state()

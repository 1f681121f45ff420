"""Streams: exactly once, at a constant global batch, whoever reads and whoever is lost."""

import random
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.data.stream import (
    IterableDatasetSource,
    Position,
    StreamReader,
    StreamSource,
    consumed_after,
    rank_sample_numbers,
    shards_of_rank,
    step_sample_numbers,
)
from lazarus.errors import DataError
from lazarus.testing import check_stream


class Counting:
    """Item k of shard i is (i, k mod length); remembers how much was really read."""

    def __init__(self, length: int = 10**9) -> None:
        self.length = length
        self.reads = 0

    def shard(self, i: int, of: int, /) -> "CountingShard":
        return CountingShard(self, i)


class CountingShard:
    def __init__(self, source: Counting, shard: int) -> None:
        self.source, self.number, self.place = source, shard, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> tuple[int, int]:
        if self.place >= self.source.length:
            raise StopIteration
        self.source.reads += 1
        self.place += 1
        return self.number, self.place - 1

    def state_dict(self) -> Mapping[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.place = state["place"]


def expected(step: int, batch: int, shards: int) -> list[tuple[int, int]]:
    return [(n % shards, n // shards) for n in step_sample_numbers(step, batch).tolist()]


@given(
    batch=st.integers(1, 40),
    shards=st.integers(1, 20),
    ranks=st.integers(1, 8),
    step=st.integers(1, 60),
)
def test_every_sample_of_a_step_has_one_reader_and_shares_are_even(
    batch: int, shards: int, ranks: int, step: int
) -> None:
    parts = [
        rank_sample_numbers(step, batch, num_shards=shards, rank=r, num_ranks=ranks)
        for r in range(ranks)
    ]
    assert np.array_equal(np.sort(np.concatenate(parts)), step_sample_numbers(step, batch))
    owned = [s for r in range(ranks) for s in shards_of_rank(r, ranks, shards)]
    assert sorted(owned) == list(range(shards))
    before, after = (consumed_after(t, batch, shards) for t in (step - 1, step))
    taken = np.bincount(step_sample_numbers(step, batch) % shards, minlength=shards)
    assert np.array_equal(after - before, taken)
    if batch <= shards:
        assert max(map(len, parts)) - min(map(len, parts)) <= 2


@given(
    seed=st.integers(0, 10**6),
    shards=st.integers(1, 9),
    batch=st.integers(1, 12),
    length=st.integers(1, 30),
)
def test_every_sample_is_committed_exactly_once_across_losses_joins_and_redos(
    seed: int, shards: int, batch: int, length: int
) -> None:
    """Ranks come, go and redo at random; some positions are handed over, some are forgotten."""
    rng = random.Random(seed)
    source = Counting(length)
    readers: dict[int, StreamReader] = {}
    known: dict[int, Position] = {}
    names = count()
    committed, stream = 0, []
    while committed < 25:
        for _ in range(rng.randint(0, 2)):
            name = next(names)
            readers[name] = StreamReader(source, num_shards=shards, global_batch=batch)
        while len(readers) > 1 and rng.random() < 0.4:
            del readers[rng.choice(list(readers))]
        if not readers:
            continue
        for rank, reader in enumerate(readers.values()):
            mine = shards_of_rank(rank, len(readers), shards)
            reader.own(mine, committed=committed, known=known)
        for _ in range(rng.randint(1, 4)):
            step = committed + 1
            ahead = rng.randint(0, 2)
            parts = [reader.read(step) for reader in readers.values()]
            for reader in readers.values():
                reader.read(step + ahead)
            if rng.random() < 0.3:
                break  # abandoned: the step is read again by whoever is there
            got = [sample for part in parts for sample in part]
            want = [(s, k % length) for s, k in expected(step, batch, shards)]
            assert sorted(got) == sorted(want)
            stream += got
            committed = step
            for reader in readers.values():
                reader.commit(committed)
                if rng.random() < 0.5:
                    known.update(reader.positions())
    assert len(stream) == committed * batch


def test_a_redo_reads_nothing_again_from_shards_that_are_still_open() -> None:
    source = Counting()
    reader = StreamReader(source, num_shards=4, global_batch=4)
    reader.own(range(4), committed=0)
    first = reader.read(1)
    assert reader.read(1) == first and source.reads == 4
    reader.own(range(3), committed=0)
    assert reader.read(1) == first[:3] and source.reads == 4


def test_a_shard_is_reopened_at_its_saved_state_not_from_the_beginning() -> None:
    source = Counting()
    reader = StreamReader(source, num_shards=2, global_batch=2)
    reader.own([0, 1], committed=0)
    for step in range(1, 101):
        reader.read(step)
        reader.commit(step)
    source.reads = 0
    heir = StreamReader(source, num_shards=2, global_batch=2)
    heir.own([1], committed=100, known=reader.positions())
    assert heir.read(101) == [(1, 100)] and source.reads == 1


def test_a_position_from_beyond_the_committed_step_is_refused() -> None:
    reader = StreamReader(Counting(), num_shards=1, global_batch=1)
    late = Position(consumed=9, state_at=9, state={"place": 9})
    with pytest.raises(DataError, match="known at item 9, but the committed step ends at item 3"):
        reader.own([0], committed=3, known={0: late})


def test_committed_samples_and_old_states_are_forgotten() -> None:
    reader = StreamReader(Counting(), num_shards=2, global_batch=6)
    reader.own([0, 1], committed=0)
    for step in range(1, 50):
        reader.read(step)
        reader.read(step + 2)
        reader.commit(step)
    kept = [len(o.kept) + len(o.saved) for o in reader._open.values()]
    assert max(kept) <= 20
    with pytest.raises(DataError, match="step 49 is read, but step 49 is committed"):
        reader.read(49)


def test_an_empty_shard_is_an_error_and_not_an_endless_loop() -> None:
    reader = StreamReader(Counting(length=0), num_shards=1, global_batch=1)
    reader.own([0], committed=0)
    with pytest.raises(DataError, match="shard 0 of 1 has no items"):
        reader.read(1)


def test_shuffled_shards_are_the_same_shards_in_another_order() -> None:
    readers = [
        StreamReader(Counting(), num_shards=8, global_batch=8, shuffle_seed=s) for s in (None, 1, 1)
    ]
    for reader in readers:
        reader.own(range(8), committed=0)
    plain, one, two = (reader.read(1) for reader in readers)
    assert one == two != plain and sorted(one) == plain


class Forgetful(CountingShard):
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.place = max(0, state["place"] - 1)


class Alive(CountingShard):
    def state_dict(self) -> Mapping[str, Any]:
        return self.__dict__


class ViewOfItself(CountingShard):
    def __init__(self, source: Counting, shard: int) -> None:
        super().__init__(source, shard)
        self.state = {"place": 0}

    def state_dict(self) -> Mapping[str, Any]:
        self.state["place"] = self.place
        return self.state

    def __next__(self) -> tuple[int, int]:
        item = super().__next__()
        self.state["place"] = self.place
        return item


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Forgetful, "goes on differently"),
        (Alive, "is a Source; a state is made of JSON values"),
        (ViewOfItself, "its state changes after it was taken"),
    ],
)
def test_check_stream_finds_a_source_that_cannot_be_resumed(
    kind: type[CountingShard], said: str
) -> None:
    class Source(Counting):
        def shard(self, i: int, of: int, /) -> CountingShard:
            return kind(self, i)

    with pytest.raises(DataError, match=said):
        check_stream(Source(40))


def test_check_stream_passes_a_good_source() -> None:
    source = Counting(40)
    assert isinstance(source, StreamSource)
    check_stream(source)
    check_stream(Counting(0))


def test_a_dataset_with_a_shuffle_buffer_is_refused_with_the_way_out() -> None:
    class BufferShuffledExamplesIterable:
        pass

    class Outer:
        ex_iterable = BufferShuffledExamplesIterable()

    class Dataset:
        _ex_iterable = Outer()

    with pytest.raises(DataError, match=r"data.shuffle_shards = true"):
        IterableDatasetSource(Dataset())


def test_a_dataset_that_keeps_its_own_state_is_a_stream() -> None:
    class Dataset:
        def __init__(self, items: list[int]) -> None:
            self.items, self.place = items, 0

        def shard(self, num_shards: int, index: int) -> "Dataset":
            return Dataset(self.items[index::num_shards])

        def __iter__(self) -> Iterator[int]:
            while self.place < len(self.items):
                self.place += 1
                yield self.items[self.place - 1]

        def state_dict(self) -> dict[str, int]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.place = state["place"]

    check_stream(IterableDatasetSource(Dataset(list(range(100)))))

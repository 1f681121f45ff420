"""Units: one fixed cut of a step's samples, dealt to any number of ranks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.data.units import Units
from lazarus.runtime.input.reader import open_reading
from lazarus.runtime.input.sources import RankPlace

SIZES = st.integers(1, 40)


@given(batch=SIZES, unit=SIZES, ranks=st.integers(1, 9))
def test_every_sample_is_dealt_once_and_units_ascend_through_the_rounds(
    batch: int, unit: int, ranks: int
) -> None:
    units = Units(global_batch=batch, unit_size=unit)
    assert [i for u in range(units.count) for i in units.samples(u)] == list(range(batch))
    dealt = [units.dealt(rank, ranks) for rank in range(ranks)]
    by_round = [u for number in zip(*dealt, strict=True) for u in number if u is not None]
    assert by_round == list(range(units.count))
    rounds = len(dealt[0])
    assert (rounds - 1) * ranks < units.count <= rounds * ranks
    assert units.slowdown(ranks) == pytest.approx(float(Fraction(rounds * ranks, units.count)))


@pytest.mark.parametrize(("batch", "unit"), [(0, 1), (1, 0), (-1, 2)])
def test_units_of_nothing_are_refused(batch: int, unit: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        Units(global_batch=batch, unit_size=unit)


class Numbers:
    """Map-style: each sample is its index."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> int:
        return index


class Stream:
    """The same kind of items as a stream of shards."""

    def shard(self, i: int, of: int) -> Any:
        return Shard(i, of)


class Shard:
    def __init__(self, i: int, of: int) -> None:
        self.at, self.i, self.of = 0, i, of

    def __iter__(self) -> Shard:
        return self

    def __next__(self) -> int:
        self.at += 1
        return self.i + self.of * (self.at - 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("data", [Numbers(), Stream()], ids=["map", "stream"])
def test_a_unit_has_the_same_samples_whichever_rank_reads_it(data: Any) -> None:
    units = Units(global_batch=11, unit_size=2)

    def read(ranks: int, step: int, committed: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rank in range(ranks):
            reading = open_reading(data, collate=list, seed=3, global_batch=11, num_shards=4)
            reading.seat(RankPlace(rank=rank, size=ranks, committed=committed, units=units))
            share = reading.share(step)
            assert share.units is not None
            first = 0
            for unit in share.units:
                size = 0 if unit is None else len(units.samples(unit))
                batch = reading.batch(step, first=first, size=size)
                if unit is not None:
                    found[unit] = batch
                    np.testing.assert_array_equal(
                        share.mine[first : first + size], share.ids_B[list(units.samples(unit))]
                    )
                first += size
            assert share.sizes[rank] == len(share.mine) == first
            reading.close()
        return found

    for step in (1, 2, 7):
        alone = read(1, step, committed=step - 1)
        assert sorted(alone) == list(range(6))
        assert [read(ranks, step, committed=step - 1) for ranks in (2, 3, 5, 7)] == [alone] * 4

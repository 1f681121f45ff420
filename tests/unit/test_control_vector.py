"""The commit vector: every lane is a sum, and a sum that is not one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.control.vector import (
    VectorLayout,
    advance_history,
    contribution,
    decode,
    sample_hash,
    start_history,
)
from lazarus.data.sampler import share, step_sample_ids
from lazarus.errors import BrokenInvariantError


def summed(
    world: int, *, step: int = 3, generation: int = 2, batch: int = 11
) -> tuple[VectorLayout, np.ndarray]:
    layout = VectorLayout(world_size=world, num_layers=2, num_experts=3)
    ids = step_sample_ids(7, step, batch, 1000)
    lanes, first = np.zeros(layout.num_lanes), 0
    for rank, size in enumerate(share(batch, world)):
        mine = ids[first : first + size]
        first += size
        lanes += contribution(
            layout,
            rank=rank,
            generation=generation,
            step=step,
            samples=len(mine),
            count=16.0 * len(mine),
            sample_hash=sample_hash(mine, step=step),
            loss_sum=2.0 * len(mine),
            aux_sum=0.5,
            found_inf=False,
            pause=rank == world - 1,
            own_s=rank + 1.0,
        )
    return layout, lanes


@given(world=st.integers(1, 40), step=st.integers(1, 10**6), generation=st.integers(1, 10**4))
def test_the_sum_says_what_all_ranks_did(world: int, step: int, generation: int) -> None:
    layout, lanes = summed(world, step=step, generation=generation)
    sums = decode(layout, lanes)
    ids = step_sample_ids(7, step, 11, 1000)
    assert (sums.step, sums.samples, sums.count) == (step, 11, 176.0)
    assert sums.sample_hash == sample_hash(ids, step=step)
    assert sums.loss == 22.0 / 176.0
    assert sums.pause and not sums.found_inf
    assert sums.times == tuple(float(r + 1) for r in range(world))


@pytest.mark.parametrize("lane", ["members", "generation", "step"])
def test_a_sum_that_lacks_a_rank_is_refused(lane: str) -> None:
    layout, lanes = summed(4)
    lanes[layout.lane(lane)] -= 1
    with pytest.raises(BrokenInvariantError, match="4 ranks"):
        decode(layout, lanes)


def test_a_vector_of_another_world_is_refused() -> None:
    layout, _ = summed(4)
    _, other = summed(5)
    with pytest.raises(BrokenInvariantError, match="commit vector"):
        decode(layout, other)


@given(ids=st.lists(st.integers(0, 10**9), min_size=2, max_size=30, unique=True), data=st.data())
def test_the_sample_hash_ignores_order_and_shares_and_sees_repeats(
    ids: list[int], data: st.DataObject
) -> None:
    whole = sample_hash(ids, step=5)
    cut = data.draw(st.integers(0, len(ids)))
    parts = sample_hash(ids[cut:], step=5) + sample_hash(ids[:cut], step=5)
    assert parts % (1 << 40) == whole
    assert sample_hash([*ids[1:], ids[1]], step=5) != whole
    assert sample_hash(ids, step=6) != whole


def test_the_history_is_a_fold_of_committed_counts() -> None:
    history = start_history(1, 2)
    for _ in range(200):
        history = advance_history(history, np.array([[3.0, 1.0]]))
    assert np.allclose(history[0], [[3.0, 1.0]])
    assert (history[1] == [[600.0, 200.0]]).all()
    assert (history[2] == [[3.0, 1.0]]).all()

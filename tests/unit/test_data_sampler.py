"""Samples and shares: who reads what is a function of (seed, step) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.data.sampler import permute, share, split_rounds, step_sample_ids


@given(
    seed=st.integers(0, 2**63),
    num_samples=st.integers(1, 400),
    global_batch=st.integers(1, 50),
)
def test_every_epoch_has_every_sample_exactly_once(
    seed: int, num_samples: int, global_batch: int
) -> None:
    steps = -(-3 * num_samples // global_batch)
    stream = np.concatenate(
        [step_sample_ids(seed, t, global_batch, num_samples) for t in range(1, steps + 1)]
    )
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part.tolist()) == list(range(num_samples))


@given(size=st.integers(1, 3000), epoch=st.integers(0, 5))
def test_the_permutation_is_one(size: int, epoch: int) -> None:
    image = permute(np.arange(size, dtype=np.uint64), seed=1, epoch=epoch, size=size)
    assert sorted(image.tolist()) == list(range(size))


def test_epochs_and_seeds_have_different_orders() -> None:
    one = step_sample_ids(0, 1, 1000, 1000)
    assert not np.array_equal(one, step_sample_ids(0, 2, 1000, 1000))
    assert not np.array_equal(one, step_sample_ids(1, 1, 1000, 1000))
    assert np.array_equal(one, step_sample_ids(0, 1, 1000, 1000))


def test_the_order_is_not_close_to_the_one_before() -> None:
    """A shuffle that kept neighbours together would correlate a batch's samples."""
    ids = step_sample_ids(0, 1, 10_000, 10_000).astype(float)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05


def test_the_order_is_pinned_because_a_resumed_run_depends_on_it() -> None:
    assert step_sample_ids(7, 3, 6, 1000).tolist() == [425, 756, 257, 998, 779, 476]


def test_a_billion_samples_cost_what_the_batch_costs() -> None:
    ids = step_sample_ids(0, 12_345, 64, 10**12)
    assert ids.dtype == np.int64 and len(set(ids.tolist())) == 64
    assert ids.min() >= 0 and ids.max() < 10**12


@pytest.mark.parametrize(("step", "batch", "samples"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nonsense_is_refused_with_the_numbers(step: int, batch: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"step={step}, global_batch={batch}"):
        step_sample_ids(0, step, batch, samples)


@given(batch=st.integers(0, 500), ranks=st.integers(1, 40))
def test_equal_shares_differ_by_at_most_one_sample(batch: int, ranks: int) -> None:
    sizes = share(batch, ranks)
    assert sum(sizes) == batch and max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(batch=st.integers(0, 500), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=16))
def test_weighted_shares_are_within_one_of_proportional(batch: int, weights: list[float]) -> None:
    sizes = share(batch, len(weights), weights)
    assert sum(sizes) == batch
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(size - batch * weight / sum(weights)) < 1 + 1e-9


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=12), micro=st.integers(1, 16))
def test_all_ranks_run_the_same_number_of_rounds(sizes: list[int], micro: int) -> None:
    rounds = split_rounds(sizes, micro)
    assert [sum(r) for r in rounds] == sizes
    assert len({len(r) for r in rounds}) == 1
    assert max(max(r) for r in rounds) <= micro
    assert len(rounds[0]) == max(1, -(-max(sizes) // micro))


def test_nobody_is_idle_after_a_loss() -> None:
    """Rows per rank and round: with 20 samples a rank, N - 1 nodes do at least 95 % of their part.

    The step's length is rounds x the largest round; a whole micro-batch as the unit would be worse.
    """
    for ranks in range(2, 17):
        sizes = share(20 * ranks, ranks - 1)
        rounds = split_rounds(sizes, 4)
        step_length = sum(max(r[i] for r in rounds) for i in range(len(rounds[0])))
        efficiency = (20 * ranks / (ranks - 1)) / step_length
        assert efficiency >= 0.95, (ranks, sizes, efficiency)

"""Which samples make up a step, and how ranks share them, as pure functions of the arguments.

Shapes: B samples of a step (the global batch), R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6  # rounds of the Feistel network; four look random already, two more are cheap
_GOLDEN = 0x9E3779B97F4A7C15


def step_sample_ids(seed: int, step: int, global_batch: int, num_samples: int) -> NDArray[np.int64]:
    """The sample ids of one step, the same on every rank and for any number of ranks.

    Every epoch is a permutation of all samples of its own; epochs follow each other without a gap.
    So each epoch has every sample exactly once, even if it ends inside a step.

    Args:
        seed: The run's seed.
        step: Step number, counted from 1.
        global_batch: Samples of every step, B.
        num_samples: Samples of the data set.

    Returns:
        int64 [B]. Memory and time are O(B), whatever ``num_samples`` is.

    Raises:
        ValueError: step < 1, global_batch < 1 or num_samples < 1.
    """
    if step < 1 or global_batch < 1 or num_samples < 1:
        raise ValueError(
            f"step={step}, global_batch={global_batch}, num_samples={num_samples}: "
            "each must be >= 1"
        )
    first = (step - 1) * global_batch
    ids_B = np.empty(global_batch, dtype=np.int64)
    filled = 0
    while filled < global_batch:
        epoch, offset = divmod(first + filled, num_samples)
        count = min(global_batch - filled, num_samples - offset)
        positions = np.arange(offset, offset + count, dtype=np.uint64)
        ids_B[filled : filled + count] = permute(
            positions, seed=seed, epoch=epoch, size=num_samples
        ).astype(np.int64)
        filled += count
    return ids_B


def permute(
    positions: NDArray[np.uint64], *, seed: int, epoch: int, size: int
) -> NDArray[np.uint64]:
    """Images of ``positions`` under the epoch's permutation of ``range(size)``.

    A balanced Feistel network permutes a power-of-four domain. A value outside ``range(size)`` is
    sent through the network again until it falls inside, so the result is still a permutation.

    Source: format-preserving encryption by cycle walking (Black and Rogaway, 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    out = _feistel(positions.astype(np.uint64), keys, half_bits)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], keys, half_bits)
        outside = outside[out[outside] >= size]
    return out


def _feistel(
    values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int
) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    base = _mix(np.array([seed % 2**64], dtype=np.uint64))
    base = _mix(base ^ np.array([epoch % 2**64], dtype=np.uint64))
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(base + steps)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); arithmetic modulo 2**64."""
    mixed = values + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def share(
    global_batch: int, num_ranks: int, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Share the samples of a step among ranks.

    Args:
        global_batch: Samples of the step, B.
        num_ranks: R; rank r takes the samples after those of the ranks below it.
        weights: Relative speeds, shape [R], each > 0; None means equal.

    Returns:
        Samples of each rank, shape [R], summing to B. Without weights sizes differ by at most one
        and lower ranks have the larger ones; with weights the largest remainders get the spare
        samples.

    Raises:
        ValueError: num_ranks < 1, a wrong number of weights, or a weight that is not > 0.
    """
    if num_ranks < 1 or global_batch < 0:
        raise ValueError(f"cannot share {global_batch} samples over {num_ranks} ranks")
    if weights is None:
        small, extra = divmod(global_batch, num_ranks)
        return tuple(small + (rank < extra) for rank in range(num_ranks))
    if len(weights) != num_ranks:
        raise ValueError(f"{len(weights)} weights for {num_ranks} ranks")
    total = sum(weights)
    if not all(w > 0 for w in weights) or not np.isfinite(total):
        raise ValueError(f"weights must be finite and > 0, got {list(weights)}")
    exact = [global_batch * w / total for w in weights]
    sizes = [int(x) for x in exact]
    # The lower rank wins a tie, so that every rank computes the same shares.
    order = sorted(range(num_ranks), key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in order[: global_batch - sum(sizes)]:
        sizes[rank] += 1
    return tuple(sizes)


def split_rounds(sizes: Sequence[int], micro_batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Cut each rank's samples into micro-batches, with the same number of rounds for all ranks.

    Args:
        sizes: Samples of each rank, shape [R].
        micro_batch_size: The most samples that a rank may take in one round.

    Returns:
        Shape [R][rounds], at least one round. A rank's rounds differ by at most one sample and may
        be 0: in an empty round the rank only takes part in the collectives.

    Raises:
        ValueError: micro_batch_size < 1.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size={micro_batch_size} must be >= 1")
    num_rounds = max(1, -(-max(sizes, default=0) // micro_batch_size))
    return tuple(share(size, num_rounds) for size in sizes)

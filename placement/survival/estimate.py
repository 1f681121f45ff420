"""Estimate survival by weighted sampling, with an interval, where exact methods take too long.

Shapes: D draws, N nodes, M minimal node sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, sqrt

import numpy as np
import numpy.typing as npt

from placement.survival.bitmasks import nodes_of

DRAWS = 4000
SIGMAS = 4.0
_BLOCK = 1 << 24


def estimated_survival(
    masks: Sequence[int], *, num_nodes: int, losses: int, seed: int
) -> tuple[float, float, float]:
    """Estimate P(survive) after ``losses`` uniformly chosen losses, with a 4-sigma interval.

    A node set is drawn in proportion to its probability of being dead, then a random superset with
    ``losses`` nodes. The failure probability is the sum of these probabilities times the mean of
    1 / (number of node sets inside the superset). If the sum exceeds 3, plain sampling is used
    because its variance is smaller.

    Returns:
        The estimate and the lower and upper end of its interval.

    Source: Karp and Luby's estimator for a union of events.
    """
    weights = [_chance(num_nodes, m.bit_count(), losses) for m in masks]
    total = sum(weights)
    if total == 0.0:
        return 1.0, 1.0, 1.0
    rng = np.random.default_rng([seed, losses, num_nodes])
    sets_MN = _matrix(masks, num_nodes)
    if total > 3.0:
        dead = _random_dead(rng, DRAWS, num_nodes, losses, None, sets_MN)
        failed = (_sets_inside(dead, sets_MN) > 0).mean()
        return _interval(1.0 - float(failed), float(failed * (1 - failed)), DRAWS, spare=1.0)
    if _at_most_one_fits(masks, losses):
        return 1.0 - total, 1.0 - total, 1.0 - total
    chosen = rng.choice(len(masks), size=DRAWS, p=np.array(weights) / total)
    dead = _random_dead(rng, DRAWS, num_nodes, losses, chosen, sets_MN)
    terms = 1.0 / np.maximum(_sets_inside(dead, sets_MN), 1)
    variance = float(terms.var()) * total * total
    return _interval(1.0 - total * float(terms.mean()), variance, DRAWS, spare=total)


def _interval(
    value: float, variance: float, draws: int, *, spare: float
) -> tuple[float, float, float]:
    """The 4-sigma interval, at least as wide as the rule of three demands."""
    half = max(SIGMAS * sqrt(variance / draws), spare * 3.0 * SIGMAS / 2.0 / draws)
    return min(max(value, 0.0), 1.0), max(value - half, 0.0), min(value + half, 1.0)


def _chance(num_nodes: int, size: int, losses: int) -> float:
    """P(all nodes of a set are dead)."""
    if size > losses:
        return 0.0
    top = lgamma(num_nodes - size + 1) - lgamma(losses - size + 1)
    return exp(top - lgamma(num_nodes + 1) + lgamma(losses + 1))


def _at_most_one_fits(masks: Sequence[int], losses: int) -> bool:
    usable = [m for m in masks if m.bit_count() <= losses]
    if len(usable) > 512:
        return False
    pairs = ((a, b) for i, a in enumerate(usable) for b in usable[:i])
    return all((a | b).bit_count() > losses for a, b in pairs)


def _matrix(masks: Sequence[int], num_nodes: int) -> npt.NDArray[np.float32]:
    sets = np.zeros((len(masks), num_nodes), dtype=np.float32)
    for row, mask in enumerate(masks):
        sets[row, list(nodes_of(mask))] = 1.0
    return sets


def _random_dead(
    rng: np.random.Generator,
    draws: int,
    num_nodes: int,
    losses: int,
    chosen: npt.NDArray[np.int64] | None,
    sets_MN: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """float32 [D, N]: 1 for each draw's ``losses`` dead nodes, which include the chosen set."""
    key = rng.random((draws, num_nodes))
    if chosen is not None:
        key -= sets_MN[chosen]
    order = np.argpartition(key, min(losses, num_nodes - 1), axis=1)[:, :losses]
    dead = np.zeros((draws, num_nodes), dtype=np.float32)
    np.put_along_axis(dead, order, 1.0, axis=1)
    return dead


def _sets_inside(
    dead: npt.NDArray[np.float32], sets_MN: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    sizes = sets_MN.sum(1)
    inside = np.zeros(len(dead), dtype=np.int64)
    step = max(1, _BLOCK // max(len(dead), 1))
    for start in range(0, len(sets_MN), step):
        block = slice(start, start + step)
        inside += (dead @ sets_MN[block].T >= sizes[block] - 0.5).sum(1)
    return inside

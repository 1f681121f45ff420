"""Token shares: divide each expert's tokens among its replicas so that nodes are evenly loaded.

Shapes: L layers, E experts, N nodes. ``member`` is bool [L, E, N].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InvalidRequestError
from placement.request import Bools, Floats, Ints

ROUNDS = 30
_SETTLED = 1e-7
_LEVEL = 1.0002
_IDLE = 1e-290
_DENSE = 60_000  # layers x experts x nodes up to which plain matrices are the fastest


@dataclass(frozen=True, slots=True)
class _Dense:
    """Sums over a placement, computed as small dense matrix products."""

    by_expert: Floats  # [L, E, N]
    by_node: Floats  # [L, N, E]

    def sums(self, factor_LN: Floats) -> Floats:
        sums: Floats = np.matmul(self.by_expert, factor_LN[:, :, None])[:, :, 0]
        return sums

    def loads(self, use_LE: Floats) -> Floats:
        loads: Floats = np.matmul(self.by_node, use_LE[:, :, None])[:, :, 0]
        return loads


@dataclass(frozen=True, slots=True)
class _Flat:
    """Sums over a placement, computed over a list of replicas sorted by layer, expert, node."""

    node_M: npt.NDArray[np.int32]
    expert_M: npt.NDArray[np.int32]
    first_X: npt.NDArray[np.intp]
    shape: tuple[int, ...]

    def sums(self, factor_LN: Floats) -> Floats:
        sums_X = np.add.reduceat(factor_LN.reshape(-1).take(self.node_M), self.first_X)
        return sums_X.reshape(self.shape[:2])

    def loads(self, use_LE: Floats) -> Floats:
        use_M = use_LE.reshape(-1).take(self.expert_M)
        size = self.shape[0] * self.shape[2]
        loads: Floats = np.bincount(self.node_M, weights=use_M, minlength=size).astype(np.float64)
        return loads.reshape(self.shape[0], -1)


def _kernel(member: Bools) -> _Dense | _Flat:
    num_layers, num_experts, num_nodes = member.shape
    if member.size <= _DENSE:
        matrix = member.astype(np.float64)
        return _Dense(matrix, np.ascontiguousarray(matrix.transpose(0, 2, 1)))
    flat = np.flatnonzero(member)
    expert_M, node = np.divmod(flat, num_nodes)
    node_M = node + expert_M // num_experts * num_nodes
    counts = np.bincount(expert_M, minlength=num_layers * num_experts)
    return _Flat(
        node_M.astype(np.int32), expert_M.astype(np.int32), np.cumsum(counts) - counts, member.shape
    )


def node_factors(
    load_LE: Floats, member: Bools, *, rounds: int = ROUNDS, start: Floats | None = None
) -> Floats:
    """Compute a factor per node such that the resulting shares level the node loads.

    With factors a, node j serves the share a_j / (sum of a over the nodes of e) of expert e. The
    factors are scaled by mean / load until the loads are level; the best round of each layer is
    kept. Of all optimal splits this is the least extreme one, so it stays good as loads drift.

    Args:
        load_LE: Tokens per expert, [L, E].
        member: The placement, bool [L, E, N].
        rounds: Most scaling rounds.
        start: Factors to continue from; ones when None.

    Returns:
        float64 [L, N].

    Raises:
        InvalidRequestError: An expert has no replica.

    Source: Sinkhorn's matrix scaling, stopped after ``rounds``.
    """
    _check_covered(member)
    kernel = _kernel(member)
    num_layers, _, num_nodes = member.shape
    total_L = load_LE.sum(1)
    # A layer whose total load is below _IDLE counts as idle.
    mean_LN = np.repeat(
        (np.where(total_L > _IDLE, total_L, 1.0) / num_nodes)[:, None], num_nodes, 1
    )
    factor = np.ones((num_layers, num_nodes)) if start is None else start
    best, best_L = factor, np.full(num_layers, np.inf)
    for _ in range(max(rounds, 1)):
        relative = kernel.loads(load_LE / kernel.sums(factor)) * factor / mean_LN
        worst_L = relative.max(1)
        gain_L = best_L - worst_L
        if (gain_L > 0).any():
            best = np.where((gain_L > 0)[:, None], factor, best)
            best_L = np.minimum(best_L, worst_L)
            if best_L.max() < _LEVEL or gain_L.max() < _SETTLED:
                break
        # A node without load keeps its factor; the bounds keep every factor finite.
        scale = 1.0 / np.where(relative > 1e-6, relative, 1.0)
        factor = np.minimum(np.maximum(factor * scale, 1e-9), 1e9)
    return best


def replicas_on_nodes(member: Bools) -> Ints:
    """Return the number of replicas on each node in each layer, int32 [L, N]."""
    width = count_width(member.shape[1])
    counts: Ints = member.view(np.uint8).sum(1, dtype=width).astype(np.int32)
    return counts


def count_width(most: int) -> type[np.uint16] | type[np.int32]:
    """Return the narrowest (fastest) type that counts up to ``most`` without overflow."""
    return np.uint16 if most < 1 << 16 else np.int32


def _check_covered(member: Bools) -> None:
    covered = member.any(2)
    if not covered.all():
        layer, expert = (int(i) for i in np.argwhere(~covered)[0])
        raise InvalidRequestError(f"layer {layer}, expert {expert} has no replica on any node")


def expert_sums(member: Bools, factor_LN: Floats) -> Floats:
    """Return the sum of factors over each expert's nodes, float64 [L, E]."""
    return _kernel(member).sums(factor_LN)


def loads_of_nodes(load_LE: Floats, member: Bools, factor_LN: Floats) -> Floats:
    """Return the tokens that each node serves with these factors, float64 [L, N]."""
    kernel = _kernel(member)
    return kernel.loads(load_LE / kernel.sums(factor_LN)) * factor_LN


def dense_shares(member: Bools, factor_LN: Floats) -> Floats:
    """Return each node's share of each expert's tokens, float64 [L, E, N]; sums to 1 over N."""
    shares: Floats = member * factor_LN[:, None, :]
    shares /= shares.sum(2)[:, :, None]
    return shares


def max_over_mean(node_load_LN: Floats) -> Floats:
    """Return the load of the busiest node over the mean of each layer, [L]; 1 if idle."""
    mean_L = node_load_LN.mean(1)
    worst_L = node_load_LN.max(1)
    ratio: Floats = np.where(mean_L > 0, worst_L / np.where(mean_L > 0, mean_L, 1.0), 1.0)
    return ratio


def balance_of(
    load_LE: Floats, member: Bools, *, share_load: Floats | None = None, rounds: int = ROUNDS
) -> Floats:
    """Return max/mean node load of every layer, [L], under levelled shares.

    Args:
        load_LE: Tokens per expert, [L, E].
        member: The placement, bool [L, E, N].
        share_load: Loads [L, E] from which the shares are made; ``load_LE`` when None.
        rounds: Most rounds of ``node_factors``.
    """
    factors = node_factors(load_LE if share_load is None else share_load, member, rounds=rounds)
    return max_over_mean(loads_of_nodes(load_LE, member, factors))

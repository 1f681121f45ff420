"""Permutations of routed copies as index arithmetic: no sort but one, no scatter, no atomics.

Shapes: T tokens, K choices, N routed copies sent, M rows received, G segments.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dispatcher.splits.routing import IntArray


def segment_index(starts_G: IntArray, lengths_G: IntArray, *, device: torch.device) -> Tensor:
    """Positions of the given segments, one segment after the other.

    Returns:
        int64 [sum of lengths]: ``starts[0] .. starts[0] + lengths[0] - 1``, then the next segment.
    """
    begins_G = np.cumsum(lengths_G) - lengths_G
    index = np.repeat(starts_G - begins_G, lengths_G)
    index += np.arange(index.size)
    return torch.from_numpy(index).to(device, non_blocking=True)


def transposed_index(lengths_AB: IntArray, *, device: torch.device) -> Tensor | None:
    """Reads rows laid out by (a, b) in the order (b, a); None when that changes nothing.

    Args:
        lengths_AB: Rows of each segment, int [A, B].
        device: Where the index is to live.
    """
    busy_AB = lengths_AB > 0
    if busy_AB.any(1).sum() <= 1 or busy_AB.any(0).sum() <= 1:
        return None
    flat = lengths_AB.reshape(-1)
    starts_AB = (np.cumsum(flat) - flat).reshape(lengths_AB.shape)
    return segment_index(starts_AB.T.reshape(-1), lengths_AB.T.reshape(-1), device=device)


def expert_order(expert_N: Tensor, *, num_experts: int) -> Tensor:
    """Copies by ascending expert, arrival order inside one; unrouted copies (-1) at the end."""
    key_N = torch.where(expert_N < 0, num_experts, expert_N)
    narrow = torch.uint8 if num_experts < 256 else torch.int32
    return torch.argsort(key_N.to(narrow), stable=True)


def send_order(order_N: Tensor, send_JE: IntArray) -> Tensor:
    """The copies in the order (target rank, expert, arrival), from their order by expert.

    Args:
        order_N: Result of ``expert_order``.
        send_JE: Copies of each expert for each target.
    """
    lengths_EJ = np.ascontiguousarray(send_JE.T)
    index = transposed_index(lengths_EJ, device=order_N.device)
    routed = int(send_JE.sum())
    return order_N[:routed] if index is None else order_N.index_select(0, index)


def inverse_order(sent_N: Tensor, *, num_copies: int) -> Tensor:
    """Where each copy was sent to; copies that were not sent point one past the last row."""
    position = torch.full((num_copies,), sent_N.shape[0], dtype=torch.int64, device=sent_N.device)
    position[sent_N] = torch.arange(sent_N.shape[0], device=sent_N.device)
    return position


def take_rows(rows_ND: Tensor, index: Tensor | None) -> Tensor:
    """The rows in the order of ``index``; None keeps them as they are."""
    return rows_ND if index is None else rows_ND.index_select(0, index)

"""Permutations of routed copies, by one stable sort and index arithmetic (no atomics).

Shapes: T tokens, K choices, N routed copies sent, M rows received, G segments.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dispatcher.splits.routing import IntArray


def segment_index(starts_G: IntArray, lengths_G: IntArray, *, device: torch.device) -> Tensor:
    """Return the positions covered by the given segments, one segment after the other.

    Returns:
        int64 [sum of lengths]: ``starts[0] .. starts[0] + lengths[0] - 1``, then the next segment.
    """
    begins_G = np.cumsum(lengths_G) - lengths_G
    index = np.repeat(starts_G - begins_G, lengths_G)
    index += np.arange(index.size)
    return torch.from_numpy(index).to(device, non_blocking=True)


def transposed_index(lengths_AB: IntArray, *, device: torch.device) -> Tensor | None:
    """Return the index that reorders rows from (a, b) order to (b, a) order.

    Args:
        lengths_AB: Rows of each segment, int [A, B].
        device: Device of the index.

    Returns:
        int64, one entry per row; None if the order is the same.
    """
    busy_AB = lengths_AB > 0
    if busy_AB.any(1).sum() <= 1 or busy_AB.any(0).sum() <= 1:
        return None
    flat = lengths_AB.reshape(-1)
    starts_AB = (np.cumsum(flat) - flat).reshape(lengths_AB.shape)
    return segment_index(starts_AB.T.reshape(-1), lengths_AB.T.reshape(-1), device=device)


def expert_order(expert_N: Tensor, *, num_experts: int) -> Tensor:
    """Return copies sorted by expert, stable; copies without an expert (-1) come last."""
    key_N = torch.where(expert_N < 0, num_experts, expert_N)
    narrow = torch.uint8 if num_experts < 256 else torch.int32
    return torch.argsort(key_N.to(narrow), stable=True)


def send_order(order_N: Tensor, send_JE: IntArray) -> Tensor:
    """Return the copies in the order (target rank, expert, arrival).

    Args:
        order_N: Result of ``expert_order``.
        send_JE: Number of copies of each expert for each target rank, [R, E].
    """
    lengths_EJ = np.ascontiguousarray(send_JE.T)
    index = transposed_index(lengths_EJ, device=order_N.device)
    routed = int(send_JE.sum())
    return order_N[:routed] if index is None else order_N.index_select(0, index)


def inverse_order(sent_N: Tensor, *, num_copies: int) -> Tensor:
    """Return the sent row of each copy; the number of sent rows for copies that were not sent."""
    position = torch.full((num_copies,), sent_N.shape[0], dtype=torch.int64, device=sent_N.device)
    position[sent_N] = torch.arange(sent_N.shape[0], device=sent_N.device)
    return position


def take_rows(rows_ND: Tensor, index: Tensor | None) -> Tensor:
    """Return the rows in the order of ``index``; unchanged if ``index`` is None."""
    return rows_ND if index is None else rows_ND.index_select(0, index)

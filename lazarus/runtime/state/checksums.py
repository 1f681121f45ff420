"""Fast checksums of state: equal bits give equal sums. Not safe against deliberate tampering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from lazarus.runtime.state.flat_bytes import as_bytes

_STRETCH = 1 << 22  # words summed at a time, to keep temporaries small


def checksum_of(rows: Sequence[Tensor]) -> int:
    """Checksum of tensors in order, in (0, 2**62]; never 0.

    Tensors on a GPU are summed there: copying all experts to the host would take longer than the
    rest of a reconfiguration. Checksums from a GPU and from a CPU cannot be compared.
    """
    if all(row.device.type == "cpu" for row in rows):
        digest = xxhash.xxh3_64()
        for row in rows:
            digest.update(as_bytes(row.contiguous()).numpy().data)
        return _positive(digest.intdigest())
    sums = torch.stack([device_sum(row) for row in rows])
    return _positive(xxhash.xxh3_64_intdigest(sums.cpu().numpy().tobytes()))


def text_checksum(*words: str) -> int:
    """Checksum of strings, in the same range as ``checksum_of``."""
    return _positive(xxhash.xxh3_64_intdigest("\n".join(words).encode()))


def _positive(value: int) -> int:
    return (value >> 2) + 1


def device_sum(row: Tensor) -> Tensor:
    """Weighted sum of a tensor's words modulo 2**64: exact, so the order of summation is free.

    Weights are odd, so that a change of a single word always changes the sum.

    Returns:
        int64 scalar on the tensor's device.
    """
    words = as_bytes(row.contiguous())
    for dtype in (torch.int32, torch.int16):
        size = torch.empty(0, dtype=dtype).element_size()
        if words.numel() % size == 0:
            words = words.view(dtype)
            break
    total = torch.zeros((), dtype=torch.int64, device=row.device)
    for first in range(0, words.numel(), _STRETCH):
        part = words[first : first + _STRETCH].to(torch.int64)
        place = torch.arange(first, first + part.numel(), device=row.device)
        weight = place * -7046029254386353131  # large and odd: neighbours get unrelated weights
        weight = (weight ^ (weight >> 29)) | 1
        total += (part * weight).sum()
    return total

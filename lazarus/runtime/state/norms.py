"""Fast square sums of gradients: single precision within stretches, double precision across them.

Double precision throughout took 6 to 8 % of a step on a CPU, mostly for the conversion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRETCH = 4096  # elements whose squares are summed in the tensor's own precision


def square_sums(rows: Sequence[Tensor]) -> list[float]:
    """Square sum of each tensor, with a relative error of about 1e-7, in one host synchronisation.

    A sum depends on the tensor's values and length alone, not on its address or the number of
    threads. Elements below 1e-22 count as zeros. A row whose squares overflow in single precision
    is summed in double precision.

    Args:
        rows: Contiguous float32 tensors.
    """
    if not rows:
        return []
    quick: list[float] = torch.stack([_by_stretches(row) for row in rows]).tolist()
    return [
        value if value < float("inf") else _in_double(row)
        for value, row in zip(quick, rows, strict=True)
    ]


def _by_stretches(row: Tensor) -> Tensor:
    row = row.detach().view(-1)
    whole = row.numel() // STRETCH * STRETCH
    parts = [torch.linalg.vector_norm(row[:whole].view(-1, STRETCH), dim=1)]
    parts.append(torch.linalg.vector_norm(row[whole:]).view(1))
    return torch.cat(parts).double().square().sum()


def _in_double(row: Tensor) -> float:
    return float(torch.linalg.vector_norm(row, dtype=torch.float64).square())

"""Whether this processor computes a row of tokens the same alone and among others.

``train.elastic_determinism`` relies on it: how many rows an expert computes at once follows from
the number of ranks. Products, activations and the optimizer of the model's own shapes are tried at
the start of each worker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dispatcher.layer.compute import Group, Saved, experts_backward, experts_forward
from dispatcher.layer.layout import ExpertLayout
from lazarus.errors import UserMistakeError
from lazarus.runtime.state.replica import Replica

ROWS = (1, 2, 5, 16, 23)  # rows of the parts that are computed alone; together 47
FEW_ROWS = (1, 3, 16)
LARGE = 1 << 21  # elements of an expert from which fewer rows are tried, so that it takes a second


def require_equal_bits(replica: Replica, *, dtype: torch.dtype) -> None:
    """Check the experts' arithmetic of this rank's model.

    Args:
        replica: The rank's model; its weights are not used.
        dtype: In which tokens are sent and computed.

    Raises:
        UserMistakeError: A row has other bits alone than among others.
    """
    banks = [layer.experts for layer in replica.layers]
    found = [layout for bank in banks for layout in (bank.layout, bank.frozen_layout)]
    layouts = {layout for layout in found if isinstance(layout, ExpertLayout)}
    for layout in sorted(layouts, key=repr):
        odd = odd_parts(layout, device=replica.device, dtype=dtype)
        if odd:
            raise UserMistakeError(
                f"train.elastic_determinism: with {torch.get_num_threads()} threads this processor "
                f"computes rows of {layout} otherwise alone than among others ({', '.join(odd)}), "
                f"so the result would depend on the number of ranks; try one thread a rank "
                f"(cluster.cpus_per_rank=1), or leave the mode off"
            )


def odd_parts(layout: ExpertLayout, *, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Where rows computed alone differ from the same rows among others: "output of 5 rows"."""
    made = torch.Generator().manual_seed(1)
    sizes = FEW_ROWS if layout.num_parameters > LARGE else ROWS
    total = sum(sizes)
    rows, grads = (torch.randn(total, layout.dim, generator=made) for _ in range(2))
    weight = torch.randn(1, layout.row_numel, generator=made) * layout.dim**-0.5
    rows, grads, weight = rows.to(device, dtype), grads.to(device, dtype), weight.to(device)
    whole = _both_ways(rows, grads, weight, layout)
    odd = []
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        alone = _both_ways(rows[part].clone(), grads[part].clone(), weight, layout)
        for what, among, single in zip(("output", "gradient"), whole, alone, strict=True):
            if not torch.equal(among[part], single):
                odd.append(f"{what} of {size} rows")
        begin += size
    return odd


def _both_ways(
    rows: Tensor, grads: Tensor, weight: Tensor, layout: ExpertLayout
) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the rows."""
    groups = (Group(0, 0, len(rows)),)
    out, hidden = experts_forward(rows, weight, groups, layout)
    saved = Saved(rows, hidden)
    back = experts_backward(grads.clone(), saved, weight, None, groups, layout)
    return out, back

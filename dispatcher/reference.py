"""Slow, simple reference implementations that the tests compare against.

Shapes: T tokens, K choices, E experts, R ranks, D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dispatcher.layer.layout import Activation
from dispatcher.splits.balance import pace
from dispatcher.splits.routing import BoolArray, FloatArray, IntArray, RoutingTable


def expert_output(x_MD: Tensor, fields: Mapping[str, Tensor], *, activation: Activation) -> Tensor:
    """Apply one expert to rows [M, D]; differentiable."""
    if activation == "swiglu":
        return (F.silu(x_MD @ fields["w_gate"]) * (x_MD @ fields["w_up"])) @ fields["w_down"]
    hidden = x_MD @ fields["w_in"]
    if "b_in" in fields:
        hidden = hidden + fields["b_in"]
    out = F.gelu(hidden) @ fields["w_out"]
    return out + fields["b_out"] if "b_out" in fields else out


def dense_moe(
    x_TD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    activation: Activation,
) -> Tensor:
    """Compute a complete MoE layer on one device; differentiable.

    Args:
        x_TD: Tokens, [T, D].
        expert_TK: Chosen experts, int64 [T, K]; -1 = no expert.
        gate_TK: Weights of the choices, [T, K].
        experts: Fields of each expert, as in ``ExpertLayout.fields``.
        activation: "gelu" or "swiglu".
    """
    out_TD = torch.zeros_like(x_TD)
    for expert, fields in enumerate(experts):
        for k in range(expert_TK.shape[1]):
            token = (expert_TK[:, k] == expert).nonzero()[:, 0]
            if token.numel():
                rows = expert_output(x_TD[token], fields, activation=activation)
                out_TD = out_TD.index_add(0, token, rows * gate_TK[token, k : k + 1])
    return out_TD


def split_cost(
    quota_ER: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float,
    ranks_per_device: float = 1.0,
    served_ER: BoolArray | None = None,
) -> float:
    """Return the cost in rows that ``balanced_quotas`` minimizes; defined in ``splits.balance``."""
    serving_ER = quota_ER > 0
    if served_ER is not None:
        serving_ER = serving_ER | served_ER
    rows = pace(quota_ER.sum(0).tolist(), ranks_per_device)
    sent = gradients_sent(serving_ER, table).tolist()
    return rows + rows_per_replica * pace(sent, ranks_per_device)


def gradients_sent(served_ER: BoolArray, table: RoutingTable) -> FloatArray:
    """Return the gradients that each rank sends if these replicas served, in experts, [R]."""
    servers_E = served_ER.sum(1)
    each_E = (servers_E - 1 + table.holds_ER.sum(1) - 1) / np.maximum(servers_E, 1)
    sent_R: FloatArray = (served_ER * each_E[:, None]).sum(0)
    return sent_R

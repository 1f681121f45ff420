"""Slow, simple reference implementations that the tests compare against.

Shapes: T tokens, K choices, E experts, D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatcher.layer.layout import Activation


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

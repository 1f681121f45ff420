"""Gating: from router logits to chosen experts and their weights. Scores are fp32.

Shapes: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


def gate_scores(logits_TE: Tensor, *, score: Score) -> Tensor:
    """Return the scores of router logits [T, E], in fp32 [T, E].

    Raises:
        ValueError: ``score`` is neither "softmax" nor "sigmoid".
    """
    if score == "softmax":
        return torch.softmax(logits_TE.float(), dim=-1)
    if score == "sigmoid":
        return torch.sigmoid(logits_TE.float())
    raise ValueError(f"unknown score {score!r}; known: softmax, sigmoid")


def top_experts(score_TE: Tensor, *, top_k: int) -> Tensor:
    """Return the ``top_k`` experts of each token, best first; ties go to the lower id.

    Returns:
        int64 [T, K].
    """
    if top_k == 1:
        return score_TE.argmax(dim=-1, keepdim=True)
    if top_k <= 4:
        rest = score_TE.clone()
        chosen = []
        for _ in range(top_k):
            best = rest.argmax(dim=-1, keepdim=True)
            rest.scatter_(1, best, -torch.inf)
            chosen.append(best)
        return torch.cat(chosen, dim=1)
    return torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]


def choose_experts(
    score_TE: Tensor,
    *,
    top_k: int,
    bias_E: Tensor | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    forced_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by score plus bias, and weight them by score alone.

    Args:
        score_TE: Scores of ``gate_scores``; gradients flow to them through the weights.
        top_k: Experts per token, 1 to E.
        bias_E: Load-balancing bias per expert, added for the choice only; carries no gradient.
        renormalize: Make the weights of each token sum to 1.
        scale: Factor on the weights, applied after ``renormalize``.
        forced_TK: Experts to use instead of the best ones, int64 [T, K]; -1 (no expert) gets
            weight 0.

    Returns:
        Experts int64 [T, K], best first, and their weights fp32 [T, K].
    """
    with torch.no_grad():
        ranked_TE = score_TE if bias_E is None else score_TE + bias_E
        expert_TK = top_experts(ranked_TE, top_k=top_k) if forced_TK is None else forced_TK
    if forced_TK is None:
        gate_TK = score_TE.gather(1, expert_TK)
    else:
        # Ids may be out of range here; the dispatch later refuses them on all ranks.
        inside_TK = expert_TK.clamp(0, score_TE.shape[1] - 1)
        gate_TK = torch.where(inside_TK == expert_TK, score_TE.gather(1, inside_TK), 0.0)
    if renormalize:
        gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return expert_TK, gate_TK if scale == 1.0 else gate_TK * scale

"""Load balancing of the router, by an auxiliary loss or by a bias, from committed global counts.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dispatcher.gating import Score


def auxiliary_sum(
    score_TE: Tensor,
    expected_E: Tensor,
    *,
    coefficient: float,
    score: Score,
    mask_T: Tensor | None = None,
) -> Tensor:
    """The balancing loss, summed over these tokens.

    Divided by the number of tokens, the loss is ``coefficient * E * sum_e f_e * mean p_e``. The
    fractions are those of the last committed step, so the sum is linear in the tokens: however a
    step is split over ranks and rounds, the parts add up to the same loss.

    Args:
        score_TE: Router scores, differentiable.
        expected_E: Fractions f_e of routed copies, summing to 1, no gradient.
        coefficient: Weight of the loss.
        score: "sigmoid" scores are normalised to probabilities first.
        mask_T: Tokens with False do not count.
    """
    probability_TE = score_TE
    if score == "sigmoid":
        probability_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    per_token_T = probability_TE @ expected_E
    if mask_T is not None:
        per_token_T = per_token_T * mask_T
    return per_token_T.sum() * (coefficient * score_TE.shape[-1])


def expected_fractions(counts_E: Tensor) -> Tensor:
    """Fractions f32 [E] for the next step's loss, from the counts of a committed step."""
    total = int(counts_E.sum())
    if total == 0:
        return torch.full((counts_E.numel(),), 1 / counts_E.numel(), dtype=torch.float32)
    return (counts_E.double() / total).float()


def updated_bias(bias_E: Tensor, counts_E: Tensor, *, rate: float = 1e-3) -> Tensor:
    """The bias after a committed step: up for experts below the mean load, down for those above.

    Args:
        bias_E: The router's bias, f32 [E].
        counts_E: Copies routed to each expert in the step.
        rate: By how much a bias changes.

    Source: the auxiliary-loss-free rule of DeepSeek-V3.
    """
    load_E = counts_E.to(torch.float64)
    return bias_E + rate * torch.sign(load_E.mean() - load_E).to(bias_E)

"""The mixture-of-experts layer: router, gates, expert path, balancing.

Shapes: B samples, S positions, T = B * S tokens, D model width, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher.eager import runs_eagerly
from dispatcher.gating import Score, choose_experts, gate_scores
from dispatcher.layer.layout import Activation
from lazarus.model.balance import auxiliary_sum, expected_fractions, updated_bias
from lazarus.model.experts import ExpertBank
from lazarus.model.protocol import moe_layers as moe_layers
from lazarus.model.routed import RoutedExperts


class MoELayer(RoutedExperts):
    """Mixture-of-experts layer: sends each token through its ``top_k`` experts and drops none.

    Outside of a run the layer holds all experts and computes the same numbers as in a run.

    Args:
        dim: Model width.
        hidden: Hidden width of one expert.
        num_experts: Experts of the layer.
        top_k: Experts per token, 1 to ``num_experts``.
        activation: "swiglu" or "gelu".
        score: "softmax" over all experts, or "sigmoid" of each.
        renormalize: Scale the weights of a token's experts to sum to 1.
        score_scale: Factor on the weights.
        num_shared: Experts that every token passes through, as one dense block; 0 for none.
        balance: "aux" adds a loss over global fractions to the training loss, "bias" adds a bias
            to the choice of experts and updates it after each step, "none" does neither.
        aux_coef: Coefficient of the auxiliary loss. Raise it if few experts get most tokens.
        bias_rate: By how much the bias changes after a step.
        bias: Whether gelu experts have biases.
        init_std: Standard deviation of initial weights; None means 1 / sqrt(fan in).
        recompute: Recompute the experts' hidden activations in the backward, to save memory.

    Raises:
        ValueError: ``top_k`` is not in 1..``num_experts``, or ``balance`` or ``score`` is unknown.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        activation: Activation = "swiglu",
        score: Score = "softmax",
        renormalize: bool = False,
        score_scale: float = 1.0,
        num_shared: int = 0,
        balance: Literal["aux", "bias", "none"] = "aux",
        aux_coef: float = 0.01,
        bias_rate: float = 1e-3,
        bias: bool = False,
        init_std: float | None = None,
        recompute: bool = False,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie in 1..{num_experts} (num_experts)")
        if balance not in ("aux", "bias", "none") or score not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown balance {balance!r} or score {score!r}")
        # The order of the draws is that of the modules: router, experts, shared experts.
        router = nn.Linear(dim, num_experts, bias=False)
        nn.init.normal_(router.weight, std=dim**-0.5 if init_std is None else init_std)
        experts = ExpertBank(
            dim=dim, hidden=hidden, num_experts=num_experts, activation=activation, bias=bias,
            init_std=init_std,
        )  # fmt: skip
        super().__init__(experts, top_k=top_k, recompute=recompute, bias_rate=bias_rate)
        self.score, self.renormalize, self.score_scale = score, renormalize, score_scale
        self.balance, self.aux_coef, self.init_std = balance, aux_coef, init_std
        self.router = router
        if balance == "bias":  # state of the model: saved and synchronised
            self.router_bias = torch.zeros(num_experts)
        self.shared = SharedExperts(dim, num_shared * hidden) if num_shared else None

    def reset_parameters(self) -> None:
        """Draw the router anew, for example after ``to_empty``. The bank draws its rows itself."""
        std = self.router.in_features**-0.5 if self.init_std is None else self.init_std
        nn.init.normal_(self.router.weight, std=std)
        if self.router_bias is not None:
            self.router_bias.zero_()

    @overload  # type: ignore[override]
    def forward(
        self, x_BSD: Tensor, *, mask_BS: Tensor | None = ..., return_logits: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, x_BSD: Tensor, *, mask_BS: Tensor | None = ..., return_logits: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    @runs_eagerly
    def forward(
        self, x_BSD: Tensor, *, mask_BS: Tensor | None = None, return_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer to activations [B, S, D].

        Args:
            x_BSD: The activations.
            mask_BS: Tokens that are False are neither routed nor counted, and yield zeros.
            return_logits: Also return the router's logits, for a loss of your own on them.

        Returns:
            Activations of the same shape; with ``return_logits`` a pair of them and of the
            differentiable logits, fp32 [B, S, E].
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1]).contiguous()
        logits_TE, score_TE = self._scores(x_TD)
        expert_TK, gate_TK = choose_experts(
            score_TE, top_k=self.top_k, bias_E=self.router_bias, renormalize=self.renormalize,
            scale=self.score_scale, forced_TK=self.context.forced_TK,
        )  # fmt: skip
        mask_T = self._mask(None if mask_BS is None else mask_BS.reshape(-1), x_TD)
        started = self._start(x_TD, expert_TK, gate_TK, mask_T)
        # Dense work that needs no peer runs while the counts are exchanged.
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        out_TD = self._finish(started, self._auxiliary(score_TE, mask_T))
        out_BSD = out_TD.view(x_BSD.shape)
        if shared_BSD is not None:
            out_BSD = out_BSD + shared_BSD
        if return_logits:
            return out_BSD, logits_TE.view(*x_BSD.shape[:-1], self.num_experts)
        return out_BSD

    def _scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Router logits and scores, in fp32 even under autocast."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.router.weight.float())
            return logits_TE, gate_scores(logits_TE, score=self.score)

    def _auxiliary(self, score_TE: Tensor, mask_T: Tensor | None) -> Tensor | None:
        if self.balance != "aux" or not self.training:
            return None
        return auxiliary_sum(
            score_TE, self.context.expected_E.to(score_TE), coefficient=self.aux_coef,
            score=self.score, mask_T=mask_T,
        )  # fmt: skip


class SharedExperts(nn.Module):
    """A dense SwiGLU block that every token passes through."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))
        return down


def take_auxiliary(model: nn.Module) -> Tensor | None:
    """Sum the auxiliary losses collected since the last call; None if there are none."""
    total: Tensor | None = None
    for layer in moe_layers(model).values():
        part, layer.context.aux_sum = layer.context.aux_sum, None
        if part is not None:
            total = part if total is None else total + part
    return total


def commit_load(model: nn.Module, *, bias_rate: float | None = None) -> None:
    """Turn the step's counts into the next step's fractions and biases, then reset the counts.

    For training without a run; in a run the runtime does this when a step is applied.
    """
    for layer in moe_layers(model).values():
        counts_E = layer.context.counts_E
        if layer.router_bias is not None:
            rate = layer.bias_rate if bias_rate is None else bias_rate
            layer.router_bias.copy_(updated_bias(layer.router_bias, counts_E, rate=rate))
        layer.context.expected_E = expected_fractions(counts_E)
        layer.context.start_step()

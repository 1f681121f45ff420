"""The layer that stands in an experts module of transformers.

Shapes: T tokens, D model width, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lazarus.hf.experts import ExpertFunction
from lazarus.hf.masks import current_mask
from lazarus.hf.routers import RouterLogits, TensorPlace
from lazarus.model.balance import auxiliary_sum
from lazarus.model.experts import ExpertBank
from lazarus.model.routed import RoutedExperts

_MASKS = 4  # forwards with masks, at most, that a backward can repeat


class AdoptedExperts(RoutedExperts):
    """Experts of a transformers model, called with the choice of the model's own router.

    Args:
        experts: The experts.
        top_k: Experts per token.
        run: Computes one expert.
        recompute: Recompute the experts' activations in the backward.
        bias_rate: By how much the bias of the choice changes after a step.
        bias: The bias of the choice, which belongs to the model's router; None if it is not moved.
        norm: Applied to each expert's output before the outputs are weighted; None for none.
    """

    def __init__(
        self,
        experts: ExpertBank,
        *,
        top_k: int,
        run: ExpertFunction,
        recompute: bool,
        bias_rate: float,
        bias: TensorPlace | None,
        norm: nn.Module | None,
    ) -> None:
        super().__init__(experts, top_k=top_k, run=run, recompute=recompute, bias_rate=bias_rate)
        # In a tuple, so that modules of the model do not become children of this one.
        self._outside = (bias, norm)
        self.aux_coef = 0.0
        self._logits: RouterLogits | None = None
        self._hook: Any = None
        self._masks: list[tuple[Tensor, Tensor | None]] = []  # newest first: choices and mask

    @property
    def router_bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias of the choice, if the run is to move it."""
        bias = self._outside[0]
        return None if bias is None else bias.tensor

    def watch(self, router: nn.Module, logits: RouterLogits, *, coefficient: float) -> None:
        """Balance the load by the logits of the model's router."""
        self.aux_coef, self._logits = coefficient, logits
        self._hook = router.register_forward_hook(logits)

    def unwatch(self) -> None:
        """Leave the model's router alone."""
        if self._hook is not None:
            self._hook.remove()
        self.aux_coef, self._logits, self._hook = 0.0, None, None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, expert_TK: Tensor, gate_TK: Tensor
    ) -> Tensor:
        """Apply each token's experts and add up their weighted outputs.

        Args:
            hidden: Activations [..., D], T tokens.
            expert_TK: Chosen experts; a number that is no expert chooses none.
            gate_TK: Weight of each choice.

        Returns:
            Activations of the same shape.
        """
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        expert_TK = expert_TK.reshape(x_TD.shape[0], -1).to(torch.int64)
        expert_TK = torch.where(expert_TK < self.num_experts, expert_TK, -1)
        gate_TK = gate_TK.reshape(expert_TK.shape).float()
        mask_T = self._token_mask(expert_TK)
        auxiliary = self._auxiliary(mask_T)
        norm = self._outside[1]
        if norm is None:
            out_TD = super().forward(x_TD, expert_TK, gate_TK, mask_T=mask_T, auxiliary=auxiliary)
            return out_TD.view(hidden.shape)
        # Each choice is a token of its own, so that outputs come back one by one.
        num_choices = expert_TK.shape[1]
        out_ND = super().forward(
            x_TD.repeat_interleave(num_choices, dim=0),
            expert_TK.reshape(-1, 1),
            torch.ones_like(gate_TK).view(-1, 1),
            mask_T=None if mask_T is None else mask_T.repeat_interleave(num_choices),
            auxiliary=auxiliary,
        )
        out_TKD: Tensor = norm(out_ND).view(*expert_TK.shape, -1) * gate_TK[..., None]
        return out_TKD.sum(1).to(hidden.dtype).view(hidden.shape)

    def _token_mask(self, expert_TK: Tensor) -> Tensor | None:
        """The mask in force; in a repeated forward that of the first one, known by its choices.

        A backward repeats forwards outside of the context that set the mask, and perhaps in
        another thread.
        """
        if in_backward():
            found = [mask for chosen, mask in self._masks if torch.equal(chosen, expert_TK)]
            return next(iter(found), self._masks[0][1] if self._masks else None)
        mask_T = current_mask(expert_TK.shape[0])
        if mask_T is not None or self._masks:
            self._masks = [(expert_TK.detach(), mask_T), *self._masks][:_MASKS]
        return mask_T

    def _auxiliary(self, mask_T: Tensor | None) -> Tensor | None:
        if self._logits is None:
            return None
        logits_TE = self._logits.take()
        if not self.training:
            return None
        expected_E = self.context.expected_E.to(logits_TE.device)
        if logits_TE.shape[-1] != self.num_experts:
            raise ValueError(
                f"the router has {logits_TE.shape[-1]} logits for {self.num_experts} experts; "
                f"leave aux_coef at 0 for this model"
            )
        score_TE = torch.softmax(logits_TE.reshape(-1, self.num_experts).float(), dim=-1)
        return auxiliary_sum(
            score_TE, expected_E, coefficient=self.aux_coef, score="softmax",
            mask_T=self._mask(mask_T, score_TE),
        )  # fmt: skip


def in_backward() -> bool:
    """Whether activation checkpointing is repeating this forward inside a backward."""
    return bool(torch._C._current_graph_task_id() != -1)

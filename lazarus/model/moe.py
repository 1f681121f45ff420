"""The mixture-of-experts layer: router, gates, expert path, balancing.

Shapes: B samples, S positions, T = B * S tokens, D model width, E experts, K choices per token.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher.errors import RoutingTableError
from dispatcher.gating import Score, choose_experts, gate_scores
from dispatcher.layer.dispatch import finish_routing, start_routing
from dispatcher.layer.layout import Activation
from dispatcher.layer.path import PathOptions, expert_path
from lazarus.model.balance import auxiliary_sum, expected_fractions, updated_bias
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank


class MoELayer(nn.Module):
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
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie in 1..{num_experts} (num_experts)")
        if balance not in ("aux", "bias", "none") or score not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown balance {balance!r} or score {score!r}")
        self.num_experts, self.top_k, self.score = num_experts, top_k, score
        self.renormalize, self.score_scale = renormalize, score_scale
        self.balance, self.aux_coef, self.bias_rate = balance, aux_coef, bias_rate
        self.router = nn.Linear(dim, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=dim**-0.5 if init_std is None else init_std)
        self.router_bias: Tensor | None
        bias_E = torch.zeros(num_experts) if balance == "bias" else None
        self.register_buffer("router_bias", bias_E)  # state of the model: saved and synchronised
        self.experts = ExpertBank(
            dim=dim, hidden=hidden, num_experts=num_experts, activation=activation, bias=bias,
            init_std=init_std,
        )  # fmt: skip
        self.shared = SharedExperts(dim, num_shared * hidden) if num_shared else None
        self._options = PathOptions(layout=self.experts.layout, recompute=recompute)
        self.context = LayerContext.solo(num_experts)

    def attach(self, context: LayerContext | None) -> None:
        """Connect the layer with a run, or disconnect it with None.

        Raises:
            RoutingTableError: The context's table has another number of experts than the layer, or
                names experts for this rank that the bank does not hold.
        """
        self.context = LayerContext.solo(self.num_experts) if context is None else context
        table = self.context.table
        if table.num_experts != self.num_experts:
            raise RoutingTableError(
                f"the table has {table.num_experts} experts, the layer {self.num_experts}"
            )
        missing = {e for e in table.slots_of(table.rank) if e >= 0} - set(
            self.experts.expert_of_slot
        )
        if missing:
            raise RoutingTableError(
                f"rank {table.rank} should hold experts {sorted(missing)}, but its bank holds "
                f"{self.experts.expert_of_slot}; allocate and assign first"
            )

    def forward(self, x_BSD: Tensor, *, mask_BS: Tensor | None = None) -> Tensor:
        """Apply the layer to activations [B, S, D].

        Args:
            x_BSD: The activations.
            mask_BS: Tokens that are False are neither routed nor counted, and yield zeros.

        Returns:
            Activations of the same shape.
        """
        context = self.context
        x_TD = _sent_dtype(x_BSD.reshape(-1, x_BSD.shape[-1]).contiguous())
        score_TE = self._scores(x_BSD.reshape(-1, x_BSD.shape[-1]))
        expert_TK, gate_TK = choose_experts(
            score_TE, top_k=self.top_k, bias_E=self.router_bias, renormalize=self.renormalize,
            scale=self.score_scale, forced_TK=context.forced_TK,
        )  # fmt: skip
        mask_T = None if mask_BS is None else mask_BS.reshape(-1)
        if context.ghost:
            mask_T = torch.zeros(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        if mask_T is not None:
            expert_TK = torch.where(mask_T[:, None], expert_TK, -1)
        repeated = _in_backward()
        counting = start_routing(
            x_TD,
            expert_TK,
            table=context.table,
            exchange=context.exchange,
            rule=context.rule,
            served_ER=context.served_before_ER if repeated else context.served_ER,
            place=context.place(
                repeated=repeated,
                differentiable=_is_differentiable(x_TD, gate_TK, self.experts.weight),
            ),
        )
        # Dense work that needs no peer runs while the counts are exchanged.
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        aux = self._auxiliary(score_TE, mask_T)
        routed = finish_routing(counting, expert_of_slot=tuple(self.experts.expert_of_slot))
        if (self.training or torch.is_grad_enabled()) and not repeated:
            context.record(routed, aux)
            if context.observer is not None:
                context.observer(context.layer, expert_TK)
        out_TD = expert_path(
            x_TD, gate_TK, self.experts.weight, routed, self._options, written=context.written,
            done=partial(context.backward_done, routed),
            anchors=None if repeated else context.anchors,
        )  # fmt: skip
        out_BSD = out_TD.to(x_BSD.dtype).view(x_BSD.shape)
        return out_BSD if shared_BSD is None else out_BSD + shared_BSD

    def _scores(self, x_TD: Tensor) -> Tensor:
        """Router scores, in fp32 even under autocast."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.router.weight.float())
            return gate_scores(logits_TE, score=self.score)

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


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The model's MoE layers by path, in the order of ``named_modules``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}


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


def _sent_dtype(x_TD: Tensor) -> Tensor:
    """Convert tokens to the lower precision of autocast, in which they are sent and computed."""
    kind = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x_TD


def _is_differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _in_backward() -> bool:
    """Whether activation checkpointing is repeating this forward inside a backward."""
    return bool(torch._C._current_graph_task_id() != -1)

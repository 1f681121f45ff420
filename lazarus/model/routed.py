"""Experts without a router: slots, dispatch, and what a run needs to know of them.

Shapes: T tokens, D model width, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dispatcher.eager import runs_eagerly
from dispatcher.errors import RoutingTableError
from dispatcher.layer.dispatch import Counting, finish_routing, start_routing
from dispatcher.layer.general import ExpertFunction
from dispatcher.layer.path import PathOptions, expert_path
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank


class RoutedExperts(nn.Module):
    """Sends each token through the experts that it was given, and drops none.

    The layer has no router: whoever calls it chooses the experts and their weights. Outside of a
    run it holds all experts and computes the same numbers as in a run.

    Args:
        experts: The experts.
        top_k: Experts per token, 1 to the number of experts.
        run: Computes one expert from rows and its tensors, see ``dispatcher.PathOptions``. None for
            a bank of swiglu or gelu experts.
        recompute: Recompute the experts' activations in the backward, to save memory.
        bias_rate: By how much ``router_bias`` changes after a step, if there is one. A subclass may
            define ``router_bias`` as a property; here it is None.

    Raises:
        ValueError: ``top_k`` does not fit, or the experts need a function ``run``.
    """

    router_bias: Tensor | None

    def __init__(
        self,
        experts: ExpertBank,
        *,
        top_k: int,
        run: ExpertFunction | None = None,
        recompute: bool = False,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts.num_experts:
            raise ValueError(f"top_k={top_k} must lie in 1..{experts.num_experts} (num_experts)")
        self.num_experts, self.top_k = experts.num_experts, top_k
        self.bias_rate, self.recompute, self.run = bias_rate, recompute, run
        if not isinstance(getattr(type(self), "router_bias", None), property):
            self.register_buffer("router_bias", None)
        self.experts = experts
        self._options: tuple[tuple[Any, ...], PathOptions] | None = None
        self._path_options()  # raises now rather than in the first forward
        self.context = LayerContext.solo(self.num_experts)

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

    @runs_eagerly
    def forward(
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        *,
        mask_T: Tensor | None = None,
        auxiliary: Tensor | None = None,
    ) -> Tensor:
        """Apply each token's experts and add up their outputs.

        Args:
            x_TD: The tokens.
            expert_TK: Chosen experts, int64; -1 for no expert.
            gate_TK: Weight of each choice. Differentiable.
            mask_T: Tokens that are False are neither routed nor counted, and yield zeros.
            auxiliary: A loss of the router to add to the training loss, summed over the tokens. It
                must be linear in the tokens, see ``lazarus.model.balance``.

        Returns:
            [T, D] in the dtype of ``x_TD``.
        """
        started = self._start(x_TD, expert_TK, gate_TK, self._mask(mask_T, x_TD))
        return self._finish(started, auxiliary)

    def _mask(self, mask_T: Tensor | None, x_TD: Tensor) -> Tensor | None:
        """The tokens to route; none at all on a rank without samples."""
        if self.context.ghost:
            return torch.zeros(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
        return None if mask_T is None else mask_T.bool()

    def _start(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, mask_T: Tensor | None
    ) -> _Started:
        """Start the exchange of counts; other work may run before ``_finish``."""
        context, sent_TD = self.context, _sent_dtype(x_TD)
        if mask_T is not None:
            expert_TK = torch.where(mask_T[:, None], expert_TK, -1)
        is_repeated = _in_backward()
        is_differentiable = _is_differentiable(sent_TD, gate_TK, self.experts.weight)
        counting = start_routing(
            sent_TD,
            expert_TK,
            table=context.table,
            exchange=context.exchange,
            rule=context.rule,
            served_ER=context.served_before_ER if is_repeated else context.served_ER,
            place=context.place(repeated=is_repeated, differentiable=is_differentiable),
        )
        return _Started(counting, sent_TD, gate_TK, x_TD.dtype, is_repeated)

    def _finish(self, started: _Started, auxiliary: Tensor | None) -> Tensor:
        context, counting = self.context, started.counting
        routed = finish_routing(counting, expert_of_slot=tuple(self.experts.expert_of_slot))
        done: Callable[[], None] = partial(context.backward_done, routed)
        if (self.training or torch.is_grad_enabled()) and not started.is_repeated:
            done = context.record(routed, auxiliary)
            if context.observer is not None:
                context.observer(context.layer, counting.expert_TK)
        out_TD = expert_path(
            started.sent_TD, started.gate_TK, self.experts.weight, routed, self._path_options(),
            frozen=self.experts.frozen, written=context.written, done=done,
            anchors=None if started.is_repeated else context.anchors,
        )  # fmt: skip
        return out_TD.to(started.kind)

    def _path_options(self) -> PathOptions:
        """Options for the bank as it is now; a bank may be frozen after the layer was made."""
        bank, known = self.experts, self._options
        wanted = (bank.layout, bank.frozen_layout, self.run, self.recompute)
        if known is None or known[0] != wanted:
            made = PathOptions(
                layout=bank.layout, frozen_layout=bank.frozen_layout, run=self.run,
                recompute=self.recompute,
            )  # fmt: skip
            known = self._options = (wanted, made)
        return known[1]


@dataclass(frozen=True, slots=True)
class _Started:
    """A forward whose counts are being exchanged."""

    counting: Counting
    sent_TD: Tensor
    gate_TK: Tensor
    kind: torch.dtype
    is_repeated: bool  # by activation checkpointing


def _sent_dtype(x_TD: Tensor) -> Tensor:
    """Convert tokens to the lower precision of autocast, in which they are sent and computed."""
    kind = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x_TD


def _is_differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _in_backward() -> bool:
    """Whether activation checkpointing is repeating this forward inside a backward."""
    return bool(torch._C._current_graph_task_id() != -1)

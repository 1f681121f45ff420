"""What a run sets for one MoE layer, and what the layer reports back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispatcher.exchange import Exchange, SoloExchange
from dispatcher.layer.dispatch import Routed
from dispatcher.layer.places import Meeting, place_code
from dispatcher.splits.routing import BoolArray, RoutingTable
from dispatcher.splits.split import SplitRule
from lazarus.errors import UserMistakeError


class BackwardDone:
    """Called at the end of a forward's backward; lives as long as the graph of that forward."""

    def __init__(self, context: LayerContext, routed: Routed) -> None:
        self._context, self._routed = context, routed
        self.is_over = False

    def __call__(self) -> None:
        self.is_over = True
        self._context.backward_done(self._routed)


@dataclass(frozen=True, slots=True)
class _Part:
    """The auxiliary loss of one forward."""

    value: Tensor
    forward: Callable[[], BackwardDone | None]

    @property
    def is_stale(self) -> bool:
        """Whether nobody can differentiate this loss together with that of its forward."""
        forward = self.forward()
        return self.value.requires_grad and (forward is None or forward.is_over)


class LayerContext:
    """Connects one MoE layer with the run. The runtime changes it between micro-batches.

    A first forward is one that activation checkpointing does not repeat.

    Shapes: T tokens, E experts, K choices per token, R ranks.

    Attributes:
        rule: How copies are split over replicas.
        expected_E: Fractions of routed copies of the last committed step, f32 [E], sum 1.
        counts_E: Copies routed in this step so far over all ranks, int64 [E]; first forwards in
            training mode or with gradients only.
        served_ER: Which replicas served tokens in this step so far; equal on all ranks.
        served_before_ER: ``served_ER`` before the newest first forward; used if that is repeated.
        observer: Called with (layer, expert_TK) at every first forward, to export a trace.
        forced_TK: Choices to take instead of the router's, to replay a trace; the weights are
            still the router's.
        written: Slots whose gradient rows hold gradients of this step. Rows of other slots are
            overwritten, so that they need not be zeroed; pass the set as ``written=`` when
            summing gradients. None: gradients are added to all rows.
        after_backward: Called when no backward of a first forward is pending. In the last round of
            a step the gradients of the layer's experts are then complete.
        ghost: This rank has no samples in this round: nothing is routed, outputs are zeros.
        anchors: Scalars left by first forwards, to be differentiated beside the loss (see
            ``expert_path``), so that the layer's backward runs on every rank whatever its loss
            depends on. None: forwards leave no anchors.
        step, round: The current step and round, which ranks compare; set by the runtime.
    """

    def __init__(
        self,
        *,
        layer: int,
        exchange: Exchange,
        table: RoutingTable,
        rule: SplitRule | None = None,
        expected_E: Tensor | None = None,
        counts_E: Tensor | None = None,
        served_ER: BoolArray | None = None,
        ghost: bool = False,
    ) -> None:
        experts = table.num_experts
        self.layer, self.exchange, self.table = layer, exchange, table
        self.rule = rule or SplitRule()
        if expected_E is None:
            expected_E = torch.full((experts,), 1 / experts, dtype=torch.float32, device="cpu")
        self.expected_E = expected_E
        if counts_E is None:  # real memory, even where a model is built on the meta device
            counts_E = torch.zeros(experts, dtype=torch.int64, device="cpu")
        self.counts_E = counts_E
        shape = table.holds_ER.shape
        self.served_ER = np.zeros(shape, dtype=np.bool_) if served_ER is None else served_ER
        self.served_before_ER = self.served_ER.copy()
        self.ghost = ghost
        self._parts: list[_Part] = []
        self._has_warned = False
        self.observer: Callable[[int, Tensor], None] | None = None
        self.forced_TK: Tensor | None = None
        self.written: set[int] | None = None
        self.after_backward: Callable[[], None] | None = None
        self.anchors: list[Tensor] | None = None
        self.step = self.round = 0
        self._open = 0  # first forwards whose backward is pending

    @classmethod
    def solo(cls, num_experts: int) -> LayerContext:
        """A context for a layer without a run: one rank that holds every expert."""
        return cls(layer=0, exchange=SoloExchange(), table=RoutingTable.solo(num_experts))

    @property
    def aux_sum(self) -> Tensor | None:
        """The auxiliary loss of this micro-batch, summed over its tokens.

        Whoever adds it to the loss sets it to None.
        """
        total: Tensor | None = None
        for part in self._parts:
            total = part.value if total is None else total + part.value
        return total

    @aux_sum.setter
    def aux_sum(self, value: None) -> None:
        self._parts.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerContext:
        """The context of a copied layer: the same peers and fractions, and counts of its own.

        Losses and gradients that are not yet taken, and what is to be called, stay with the
        original.
        """
        copied = LayerContext(
            layer=self.layer, exchange=self.exchange, table=self.table, rule=self.rule,
            expected_E=self.expected_E.clone(), counts_E=self.counts_E.clone(),
            served_ER=self.served_ER.copy(),
        )  # fmt: skip
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """A pickled context has no losses that are not yet taken: their graphs stay here."""
        return self.__dict__ | {"_parts": []}

    def start_step(self) -> None:
        """Forget what an earlier step or an abandoned attempt left behind."""
        self.counts_E.zero_()
        self.served_ER[:] = False
        self.served_before_ER[:] = False
        self.aux_sum = None
        self.after_backward, self._open = None, 0
        if self.written is not None:
            self.written = set()
        if self.anchors is not None:
            self.anchors = []

    def start_round(self, *, step: int, number: int) -> None:
        """Begin a micro-batch; every backward of earlier ones is over."""
        self.step, self.round = step, number
        self._open = 0  # forwards that nothing differentiates have no backward to end them

    def place(self, *, repeated: bool, differentiable: bool) -> int:
        """Code of this forward's place in the step; 0 if anchors are not in use."""
        if self.anchors is None:
            return 0
        kind = Meeting.FORWARD if differentiable else Meeting.WITHOUT_GRAD
        kind = Meeting.REPEATED if repeated else kind
        return place_code(kind, layer=self.layer, round=self.round, step=self.step)

    def take_anchors(self) -> list[Tensor]:
        """Return the anchors of the forwards since the last call, and start a new list."""
        found, self.anchors = self.anchors or [], []
        return found

    def record(self, routed: Routed, aux: Tensor | None) -> Callable[[], None]:
        """Add up one first forward's load, serving replicas and auxiliary loss.

        Returns:
            Function to call at the end of the backward.

        Raises:
            UserMistakeError: Gradients are added in an order of units, and the layer runs twice in
                one forward pass.
        """
        if self.rule.by_source and self._open:
            raise UserMistakeError(
                f"MoE layer {self.layer} runs twice in one forward pass: the order in which its "
                "gradients are added would depend on the number of ranks; with "
                "train.elastic_determinism use a layer for each place"
            )
        self._open += 1
        self.counts_E += torch.from_numpy(routed.counts_RE.sum(0)).to(self.counts_E)
        self.served_before_ER = self.served_ER.copy()
        self.served_ER |= routed.split.served_ER
        done = BackwardDone(self, routed)
        if self.anchors is None:
            self._forget_stale()
        if aux is not None:
            self._parts.append(_Part(aux, weakref.ref(done)))
        return done

    def _forget_stale(self) -> None:
        """Give up losses that nobody took; outside a run they would keep every graph alive."""
        kept = [part for part in self._parts if not part.is_stale]
        if len(kept) < len(self._parts) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the balancing loss of an earlier forward was not used and is given up: outside a "
                "run, add take_auxiliary(model) to the loss, or build the layer with "
                "balance='none'",
                stacklevel=2,
            )
        self._parts = kept

    def backward_done(self, routed: Routed) -> None:
        """Note that the backward of one forward is over; the replicas it used have gradients."""
        self.served_ER |= routed.split.served_ER  # a repeated forward may have split otherwise
        self._open -= 1
        if self._open == 0 and self.after_backward is not None:
            self.after_backward()

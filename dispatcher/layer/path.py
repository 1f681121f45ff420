"""``expert_path``: the complete expert path of one layer as one autograd function.

Forward: gather, all-to-all, experts, all-to-all, weighted sum. The hand-written backward runs the
same steps in reverse. Sums over the K choices run in ascending order and use no atomic adds, so
equal inputs give bit-identical results.

Shapes: T tokens, K choices, N copies sent, M rows received, D width, S slots, P parameters a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatcher.errors import DispatchInputError
from dispatcher.layer.compute import Group, Saved, experts_backward, experts_forward
from dispatcher.layer.dispatch import Routed
from dispatcher.layer.general import (
    ExpertFunction,
    Graph,
    RandomState,
    Tensors,
    run_backward,
    run_forward,
)
from dispatcher.layer.layout import ExpertLayout, RowLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class PathOptions:
    """Options of ``expert_path`` that are the same for every micro-batch.

    Attributes:
        layout: Layout of the trained tensors of one expert in a row of the bank.
        recompute: Keep no hidden activations and recompute them in the backward. Set this to save
            memory at the cost of time.
        run: Computes one expert: ``run(rows, tensors)`` takes rows [M, D] and the expert's tensors
            by name, and returns rows [M, D]. The function must treat each row by itself and be
            differentiable by autograd. None: the hand-written arithmetic of an ``ExpertLayout``.
        frozen_layout: Layout of an expert's frozen tensors; None if all are trained. Without
            ``run``, either all tensors are trained or all are frozen.

    Raises:
        ValueError: Without ``run``, the layout is not an ``ExpertLayout``.
    """

    layout: RowLayout
    recompute: bool = False
    run: ExpertFunction | None = None
    frozen_layout: RowLayout | None = None

    def __post_init__(self) -> None:
        if self.run is None and self.written_by_hand is None:
            raise ValueError(
                f"no function `run` is given, and {self.layout} with frozen {self.frozen_layout} "
                f"is not one of the kinds that need none"
            )

    @property
    def written_by_hand(self) -> ExpertLayout | None:
        """The layout, trained or frozen as a whole, that needs no ``run``."""
        if self.frozen_layout is not None:
            whole = None if self.layout.fields else self.frozen_layout
        else:
            whole = self.layout
        return whole if isinstance(whole, ExpertLayout) else None


def expert_path(
    x_TD: Tensor,
    gate_TK: Tensor,
    weight: Tensor,
    routed: Routed,
    options: PathOptions,
    *,
    frozen: Tensor | None = None,
    written: set[int] | None = None,
    done: Callable[[], None] | None = None,
    anchors: list[Tensor] | None = None,
) -> Tensor:
    """Send tokens to their experts, apply the experts, and combine the results. Collective.

    The backward adds the gradient of ``weight`` to ``weight.grad`` directly (created if None)
    instead of returning the gradient through the graph.

    Args:
        x_TD: Tokens [T, D], in the dtype that is sent and computed.
        gate_TK: Weight of each choice, fp32 [T, K].
        weight: The expert bank, [S, P]: one row of trained parameters per slot.
        routed: Handle of this micro-batch, from ``finish_routing``; used up by the call.
        options: Layout of a row, and whether to recompute.
        frozen: Frozen parameters, [S, F], if the options have a ``frozen_layout``.
        written: Slots whose gradient rows already hold gradients of this step. The backward
            overwrites other rows (so they need not be zeroed) and adds their slots to the set.
            None: add to all rows.
        done: Called at the end of the backward, after the gradients of ``weight`` were added and
            the last exchange of this call has ended.
        anchors: If given and there is a backward, a scalar 0 is appended. Differentiate the anchor
            together with the loss: the backward then runs, with its exchanges, even if the loss
            does not depend on the result. Otherwise the other ranks would wait for this one.

    Returns:
        [T, D] in the dtype of ``x_TD``; zeros for tokens that were sent nowhere.

    Raises:
        DispatchInputError: The tokens differ from the routed ones, the weights do not fit the
            choices, or the bank does not fit the layout; nothing was sent.
        HandleError: The handle was used before.
    """
    routed.check_tokens(x_TD)
    routed.check_weights(gate_TK)
    tensors = Tensors(
        weight=weight, layout=options.layout, frozen=frozen, frozen_layout=options.frozen_layout
    )
    _check_bank(tensors, routed)
    routed.spend()
    result: tuple[Tensor, Tensor] = _ExpertPath.apply(  # type: ignore[no-untyped-call]
        x_TD, gate_TK, weight,
        _Call(
            routed=routed, tensors=tensors, options=options, written=written, done=done,
            is_kept=torch.is_grad_enabled(),
        ),
    )  # fmt: skip
    out_TD, anchor = result
    if anchors is not None and anchor.requires_grad:
        anchors.append(anchor)
    return out_TD


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """What one call passes from the forward to the backward, beside what it computed."""

    routed: Routed
    tensors: Tensors
    options: PathOptions
    written: set[int] | None
    done: Callable[[], None] | None
    is_kept: bool  # a backward may follow


@dataclass(slots=True)
class _Kept:
    """What the forward keeps for the experts' backward."""

    saved: Saved
    graphs: list[Graph] | None = None
    random: RandomState | None = None


class _ExpertPath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_TK: Tensor, weight: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor]:
        routed = call.routed
        with torch.autocast(x_TD.device.type, enabled=False):
            # Rows are passed on without a variable, so that at most three copies exist at a time.
            x_MD = routed.to_experts(gather_copies(x_TD, routed), label="dispatch", is_ours=True)
            kept = _Kept(Saved(x_MD, ()))
            del x_MD
            y_ND = routed.to_sources(_through_experts(kept, call), label="combine", is_ours=True)
            out_TD = combine_copies(y_ND, gate_TK, routed)
        ctx.save_for_backward(gate_TK)
        ctx.kept, ctx.call = (kept, y_ND), call
        ctx.set_materialize_grads(False)
        return out_TD, gate_TK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        (gate_TK,) = ctx.saved_tensors
        call: _Call = ctx.call
        routed = call.routed
        if ctx.kept is None:
            raise RuntimeError("the expert path was already differentiated; run the forward again")
        kept, y_ND = ctx.kept
        ctx.kept = None
        if grads[0] is None:  # the loss does not depend on the result, but other ranks wait
            grad_TD = y_ND.new_zeros(routed.num_tokens, y_ND.shape[1])
        else:
            grad_TD = grads[0].contiguous()
        back_ND, grad_gate_TK = output_gradients(grad_TD, y_ND, gate_TK, routed)
        del y_ND
        grad_MD = routed.to_experts(back_ND, label="combine_grad", is_ours=True)
        del back_ND
        grad_x_MD = _back_through_experts(grad_MD, kept, call)
        del grad_MD, kept
        grad_ND = routed.to_sources(grad_x_MD, label="dispatch_grad", is_ours=True)
        del grad_x_MD
        grad_x_TD = sum_copies(grad_ND, routed)
        if call.done is not None:
            call.done()
        return grad_x_TD, grad_gate_TK, None, None


def _through_experts(kept: _Kept, call: _Call) -> Tensor:
    """Apply the experts to received rows, and keep what the backward needs; returns [M, D]."""
    saved, options, groups = kept.saved, call.options, _groups(call)
    if options.run is None:
        weight, layout = _whole(call)
        cast = None if options.recompute else saved.weights
        y_MD, hidden = experts_forward(saved.x_MD, weight, groups, layout, cast=cast)
        if not options.recompute:
            saved.hidden = hidden
        return y_MD
    keeps = call.is_kept and not options.recompute
    if call.is_kept and options.recompute:
        kept.random = RandomState(saved.x_MD.device)
    y_MD, graphs = run_forward(saved.x_MD, call.tensors, groups, options.run, keeps_graphs=keeps)
    kept.graphs = graphs if keeps else None
    return y_MD


def _back_through_experts(grad_MD: Tensor, kept: _Kept, call: _Call) -> Tensor:
    """Return the gradient of the received rows, and add those of the experts' parameters."""
    saved, options, groups = kept.saved, call.options, _groups(call)
    target = grad_buffer(call.tensors.weight)
    if options.run is None:
        weight, layout = _whole(call)
        if weight is not call.tensors.weight:
            target = None
        return experts_backward(
            grad_MD, saved, weight, target, groups, layout, written=call.written,
            parts=call.routed.parts,
        )  # fmt: skip
    graphs = kept.graphs
    if graphs is None:
        assert kept.random is not None
        with torch.autocast(grad_MD.device.type, enabled=False), kept.random.again():
            graphs = run_forward(
                saved.x_MD, call.tensors, groups, options.run, keeps_graphs=True
            )[1]  # fmt: skip
    return run_backward(grad_MD, graphs, groups, call.tensors, target, written=call.written)


def _groups(call: _Call) -> tuple[Group, ...]:
    """The rows that are computed together. A user's function sees those of one source at a time."""
    routed = call.routed
    return routed.groups if routed.parts is None or call.options.run is None else routed.parts


def _whole(call: _Call) -> tuple[Tensor, ExpertLayout]:
    """The rows that the hand-written arithmetic uses, and their layout."""
    layout, tensors = call.options.written_by_hand, call.tensors
    assert layout is not None
    return (tensors.weight if tensors.frozen is None else tensors.frozen), layout


def refuse_second_order() -> None:
    """Check that a backward is not itself to be differentiated.

    Raises:
        RuntimeError: It is, by ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "second-order gradients (create_graph=True) through the dispatcher are not supported: "
            "its backward exchanges rows between ranks and cannot be differentiated again"
        )


def _check_bank(tensors: Tensors, routed: Routed) -> None:
    num_slots = 1 + max((group.slot for group in routed.groups), default=-1)
    rows = [(tensors.weight, tensors.layout)]
    if tensors.frozen_layout is not None:
        frozen = tensors.weight.new_empty(0) if tensors.frozen is None else tensors.frozen
        rows.append((frozen, tensors.frozen_layout))
    for bank, layout in rows:
        fits = bank.dim() == 2 and bank.shape[1] == layout.row_numel
        if routed.dim != layout.dim or not fits or bank.shape[0] < num_slots:
            raise DispatchInputError(
                f"tokens of width {routed.dim} and a bank {tuple(bank.shape)} for a layout of "
                f"width {layout.dim}, rows of {layout.row_numel} and at least {num_slots} slots"
            )
    if (tensors.frozen is None) != (tensors.frozen_layout is None):
        raise DispatchInputError("a bank of frozen rows needs a frozen_layout in the options")


def grad_buffer(weight: Tensor) -> Tensor | None:
    """Return ``weight.grad``, created if needed; None if ``weight`` requires no gradient."""
    if not weight.requires_grad:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def gather_copies(x_TD: Tensor, routed: Routed) -> Tensor:
    """Return the token of each sent copy, [N, D]."""
    token_N = routed.sent_N if routed.top_k == 1 else routed.sent_N // routed.top_k
    return x_TD.index_select(0, token_N)


def combine_copies(y_ND: Tensor, gate_TK: Tensor, routed: Routed) -> Tensor:
    """Return the weighted sum over each token's choices, in ascending order, [T, D]."""
    out_TD = y_ND.new_empty(routed.num_tokens, y_ND.shape[1], dtype=gate_TK.dtype)
    for k in range(routed.top_k):
        rows_TD = _rows_of_choice(y_ND, routed, k)
        if k == 0:
            torch.mul(rows_TD, gate_TK[:, :1], out=out_TD)
        else:
            out_TD.addcmul_(rows_TD.to(out_TD.dtype), gate_TK[:, k : k + 1])
    return out_TD.to(y_ND.dtype)


def output_gradients(
    grad_TD: Tensor, y_ND: Tensor, gate_TK: Tensor, routed: Routed
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sent copies' outputs and of their weights.

    Args:
        grad_TD: Gradient of the combined output.
        y_ND: The copies' outputs in sent order; overwritten.
        gate_TK: Weight of each choice.
        routed: Handle of the dispatch.

    Returns:
        [N, D] in sent order, the token's gradient times the copy's weight; and fp32 [T, K], the
        copy's output times the token's gradient, 0 for a copy that was not sent.
    """
    back_ND = gather_copies(grad_TD, routed)
    grad_gate_N = torch.sum(y_ND.mul_(back_ND), dim=-1, dtype=gate_TK.dtype)
    grad_gate_TK = gate_TK.new_zeros(gate_TK.shape)
    grad_gate_TK.view(-1)[routed.sent_N] = grad_gate_N
    gate_N = gate_TK.reshape(-1).index_select(0, routed.sent_N).to(back_ND.dtype)
    return back_ND.mul_(gate_N[:, None]), grad_gate_TK


def sum_copies(grad_ND: Tensor, routed: Routed) -> Tensor:
    """Return the sum over each token's copies, in ascending order of choice, [T, D]."""
    out_TD = _rows_of_choice(grad_ND, routed, 0)
    for k in range(1, routed.top_k):
        out_TD += _rows_of_choice(grad_ND, routed, k)
    return out_TD


def _rows_of_choice(rows_ND: Tensor, routed: Routed, k: int) -> Tensor:
    """The row of each token's k-th copy, [T, D]; zeros for a copy that was not sent."""
    position_T, num_sent = routed.position_TK[:, k], routed.num_sent
    if num_sent == routed.num_tokens * routed.top_k:
        return rows_ND.index_select(0, position_T)
    if num_sent == 0:
        return rows_ND.new_zeros(routed.num_tokens, rows_ND.shape[1])
    rows_TD = rows_ND.index_select(0, position_T.clamp_max(num_sent - 1))
    return rows_TD.masked_fill_((position_T == num_sent)[:, None], 0)

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
from dispatcher.layer.compute import Saved, experts_backward, experts_forward
from dispatcher.layer.dispatch import Routed
from dispatcher.layer.layout import ExpertLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class PathOptions:
    """Options of ``expert_path`` that are the same for every micro-batch.

    Attributes:
        layout: Layout of one expert's row in the bank.
        recompute: Keep no hidden activations and recompute them in the backward. Set this to save
            memory at the cost of time.
    """

    layout: ExpertLayout
    recompute: bool = False


def expert_path(
    x_TD: Tensor,
    gate_TK: Tensor,
    weight: Tensor,
    routed: Routed,
    options: PathOptions,
    *,
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
        weight: The expert bank, [S, P]: one row of parameters per slot.
        routed: Handle of this micro-batch, from ``finish_routing``; used up by the call.
        options: Layout of a row, and whether to recompute.
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
    _check_bank(weight, routed, options.layout)
    routed.spend()
    result: tuple[Tensor, Tensor] = _ExpertPath.apply(  # type: ignore[no-untyped-call]
        x_TD, gate_TK, weight, routed, options, written, done
    )
    out_TD, anchor = result
    if anchors is not None and anchor.requires_grad:
        anchors.append(anchor)
    return out_TD


class _ExpertPath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_TK: Tensor,
        weight: Tensor,
        routed: Routed,
        options: PathOptions,
        written: set[int] | None,
        done: Callable[[], None] | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_TD.device.type, enabled=False):
            # Rows are passed on without a variable, so that at most three copies exist at a time.
            x_MD = routed.to_experts(gather_copies(x_TD, routed), label="dispatch", is_ours=True)
            kept = Saved(x_MD, ())
            y_ND, hidden = _through_experts(kept, weight, routed, options)
            out_TD = combine_copies(y_ND, gate_TK, routed)
        ctx.save_for_backward(gate_TK)
        if not options.recompute:
            kept.hidden = hidden
        ctx.kept = kept, y_ND
        ctx.weight, ctx.routed, ctx.options, ctx.written = weight, routed, options, written
        ctx.done = done
        ctx.set_materialize_grads(False)
        return out_TD, gate_TK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_TK,) = ctx.saved_tensors
        routed: Routed = ctx.routed
        if ctx.kept is None:
            raise RuntimeError("the expert path was already differentiated; run the forward again")
        saved, y_ND = ctx.kept
        ctx.kept = None
        if grads[0] is None:  # the loss does not depend on the result, but other ranks wait
            grad_TD = y_ND.new_zeros(routed.num_tokens, y_ND.shape[1])
        else:
            grad_TD = grads[0].contiguous()
        back_ND, grad_gate_TK = output_gradients(grad_TD, y_ND, gate_TK, routed)
        del y_ND
        grad_MD = routed.to_experts(back_ND, label="combine_grad", is_ours=True)
        del back_ND
        grad_x_MD = experts_backward(
            grad_MD, saved, ctx.weight, grad_buffer(ctx.weight), routed.groups, ctx.options.layout,
            written=ctx.written,
        )  # fmt: skip
        del grad_MD, saved
        grad_ND = routed.to_sources(grad_x_MD, label="dispatch_grad", is_ours=True)
        del grad_x_MD
        grad_x_TD = sum_copies(grad_ND, routed)
        if ctx.done is not None:
            ctx.done()
        return grad_x_TD, grad_gate_TK, None, None, None, None, None


def _check_bank(weight: Tensor, routed: Routed, layout: ExpertLayout) -> None:
    num_slots = 1 + max((group.slot for group in routed.groups), default=-1)
    fits = weight.dim() == 2 and weight.shape[1] == layout.row_numel
    if routed.dim != layout.dim or not fits or weight.shape[0] < num_slots:
        raise DispatchInputError(
            f"tokens of width {routed.dim} and a bank {tuple(weight.shape)} for a layout of width "
            f"{layout.dim}, rows of {layout.row_numel} and at least {num_slots} slots"
        )


def _through_experts(
    kept: Saved, weight: Tensor, routed: Routed, options: PathOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply the experts to received rows and send the outputs back; also returns hidden tensors."""
    cast = None if options.recompute else kept.weights
    y_MD, hidden = experts_forward(kept.x_MD, weight, routed.groups, options.layout, cast=cast)
    return routed.to_sources(y_MD, label="combine", is_ours=True), hidden


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

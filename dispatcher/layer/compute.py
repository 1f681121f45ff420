"""The experts' arithmetic on rows grouped by expert, with hand-written forward and backward.

Each group is one matrix product. Small groups are padded to ``MIN_ROWS`` rows so that a row's bits
do not depend on the number of other rows (with one thread; several threads divide the rows among
them). Weight gradients are added directly to the flat buffer.

Shapes: M rows in all groups, D model width, H hidden width, S slots, P parameters per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatcher.layer.layout import ExpertLayout, RowLayout

MIN_ROWS = 16  # smaller products use other kernels, whose results differ in the last bits
# On Intel CPUs, MKL splits a sum deeper than this over a row-major matrix in a way that depends on
# the number of rows (below or above 150). The sum is therefore split here, always the same way.
MAX_DEPTH = 512


@dataclass(frozen=True, slots=True)
class Group:
    """A range of rows, ``begin`` to ``end`` (exclusive), of the expert in ``slot``."""

    slot: int
    begin: int
    end: int


def parts_of(groups: Sequence[Group], rows_GI: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    """Cut each group into the rows of each source rank, in rank order; empty parts are left out."""
    parts = []
    for group, rows_I in zip(groups, rows_GI, strict=True):
        begin = group.begin
        for count in rows_I:
            if count:
                parts.append(Group(group.slot, begin, begin + count))
            begin += count
    return tuple(parts)


def groups_of(slots: Sequence[int], rows: Sequence[int]) -> tuple[Group, ...]:
    """Make consecutive groups from slots and row counts; groups without rows are left out."""
    groups, begin = [], 0
    for slot, count in zip(slots, rows, strict=True):
        if count:
            groups.append(Group(slot, begin, begin + count))
        begin += count
    return tuple(groups)


@dataclass(slots=True)
class Saved:
    """Values that the forward saves for the backward.

    Attributes:
        x_MD: The experts' input.
        hidden: Hidden tensors of ``experts_forward``; empty if the backward recomputes them.
        weights: Each group's weights cast to the dtype of the arithmetic; empty if no cast was
            needed.
    """

    x_MD: Tensor
    hidden: tuple[Tensor, ...]
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def experts_forward(
    x_MD: Tensor,
    weight_SP: Tensor,
    groups: Sequence[Group],
    layout: ExpertLayout,
    *,
    cast: list[dict[str, Tensor]] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Apply each group's expert to its rows.

    Args:
        x_MD: Rows grouped by expert.
        weight_SP: One row of parameters per slot.
        groups: Row range of each expert.
        layout: Layout of a parameter row.
        cast: If given, weights that had to be cast are appended, for ``Saved.weights``.

    Returns:
        The output [M, D], and the hidden tensors for ``experts_backward``.
    """
    sent = x_MD.dtype
    x_MD = x_MD.to(arithmetic_dtype(x_MD))
    weights = _weights(weight_SP, groups, layout, x_MD.dtype)
    if cast is not None and x_MD.dtype != weight_SP.dtype:
        cast += weights
    hidden = _hidden(x_MD, weights, groups, layout)
    y_MD = torch.empty_like(x_MD)
    out = "w_down" if layout.activation == "swiglu" else "w_out"
    for group, fields in zip(groups, weights, strict=True):
        _rows_times(hidden[-1], fields[out], fields.get("b_out"), group, into=y_MD)
    return y_MD.to(sent), hidden


def experts_backward(
    grad_MD: Tensor,
    saved: Saved,
    weight_SP: Tensor,
    grad_SP: Tensor | None,
    groups: Sequence[Group],
    layout: ExpertLayout,
    *,
    written: set[int] | None = None,
    parts: Sequence[Group] | None = None,
) -> Tensor:
    """Return the gradient of the rows, and add the weight gradients to ``grad_SP``.

    Args:
        grad_MD: Gradient of the output rows; its memory is reused for the result.
        saved: Values of the forward.
        weight_SP: One row of parameters per slot.
        grad_SP: Buffer of the weight gradients; None if they are not wanted.
        groups: Row range of each expert.
        layout: Layout of a parameter row.
        written: Slots whose rows in ``grad_SP`` already hold gradients of this step. Rows of other
            slots are overwritten, and their slots are added to the set. None: add to all rows.
        parts: Parts of the groups whose weight gradients are computed one by one and then added in
            this order (see ``parts_of``). None: one product for each group.
    """
    target = None
    if grad_SP is not None:
        target = WeightGradient(grad_SP, layout, groups, written, parts=parts)
    sent = grad_MD.dtype
    x_MD, grad_MD = (rows.to(arithmetic_dtype(rows)) for rows in (saved.x_MD, grad_MD))
    weights = saved.weights or _weights(weight_SP, groups, layout, x_MD.dtype)
    hidden = saved.hidden or _hidden(x_MD, weights, groups, layout)
    backward = _swiglu_backward if layout.activation == "swiglu" else _gelu_backward
    return backward(grad_MD, x_MD, hidden, weights, target, groups).to(sent)


def arithmetic_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which the experts compute: that of ``rows``, or fp32 on some CPUs.

    On a CPU without bf16 hardware a bf16 product takes up to fifty times as long as in fp32.
    """
    if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16):
        return rows.dtype if _has_fast_low_precision() else torch.float32
    return rows.dtype


@cache
def _has_fast_low_precision() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class WeightGradient:
    """Accumulates weight gradients in the rows of a flat buffer.

    Args:
        grad_SP: The buffer.
        layout: Layout of a row.
        groups: All groups of this backward.
        written: Slots whose rows already hold gradients of this step. Rows of other slots in
            ``groups`` are overwritten (padding with zeros), and their slots are added to the set.
            None: add to all rows.
        parts: Parts of the groups that are multiplied one by one; None: each group at once.
    """

    def __init__(
        self,
        grad_SP: Tensor,
        layout: RowLayout,
        groups: Sequence[Group],
        written: set[int] | None,
        *,
        parts: Sequence[Group] | None = None,
    ) -> None:
        self._parts: dict[int, list[Group]] | None = None
        if parts is not None:
            self._parts = {group.slot: [] for group in groups}
            for part in parts:
                self._parts[part.slot].append(part)
        self._rows = {group.slot: layout.views(grad_SP[group.slot]) for group in groups}
        self._fresh: set[int] = set()
        if written is not None:
            self._fresh = {group.slot for group in groups} - written
            written |= self._fresh
            if layout.row_numel > layout.num_parameters:
                for slot in self._fresh:
                    grad_SP[slot, layout.num_parameters :].zero_()

    def put(self, group: Group, grads: Mapping[str, Tensor]) -> None:
        """Add finished gradients to the fields of a group's expert, by name."""
        into, fresh = self._rows[group.slot], group.slot in self._fresh
        for name, grad in grads.items():
            into[name].copy_(grad) if fresh else into[name].add_(grad)
        self._fresh.discard(group.slot)  # another group of the same expert may follow

    def add(
        self, group: Group, field: str, a_MK: Tensor, g_MN: Tensor, *, bias: str | None = None
    ) -> None:
        """Add ``a[group]^T g[group]`` to ``field``, and the sum of ``g[group]`` to ``bias``."""
        fresh = group.slot in self._fresh
        if self._parts is None:
            self._add(group, field, a_MK, g_MN, bias=bias, fresh=fresh, apart=False)
            return
        for part in self._parts[group.slot]:
            self._add(part, field, a_MK, g_MN, bias=bias, fresh=fresh, apart=True)
            fresh = False

    def _add(
        self,
        group: Group,
        field: str,
        a_MK: Tensor,
        g_MN: Tensor,
        *,
        bias: str | None,
        fresh: bool,
        apart: bool,
    ) -> None:
        a, g = a_MK[group.begin : group.end], g_MN[group.begin : group.end]
        into = self._rows[group.slot]
        if apart or a.dtype != into[field].dtype:  # a fused product and sum has other bits
            product = torch.mm(a.t(), g)
            into[field].copy_(product) if fresh else into[field].add_(product)
        elif fresh:
            torch.mm(a.t(), g, out=into[field])
        else:
            into[field].addmm_(a.t(), g)
        if bias in into:
            total = g.sum(0, dtype=into[bias].dtype)
            into[bias].copy_(total) if fresh else into[bias].add_(total)


def _hidden(
    x_MD: Tensor,
    weights: Sequence[Mapping[str, Tensor]],
    groups: Sequence[Group],
    layout: ExpertLayout,
) -> tuple[Tensor, ...]:
    """Hidden tensors, each [M, H]: gelu (before, after activation); swiglu (gate, up, product)."""
    names = ("w_gate", "w_up") if layout.activation == "swiglu" else ("w_in",)
    parts = [x_MD.new_empty(x_MD.shape[0], layout.hidden) for _ in names]
    for group, fields in zip(groups, weights, strict=True):
        for name, part in zip(names, parts, strict=True):
            _rows_times(x_MD, fields[name], fields.get("b_in"), group, into=part)
    if layout.activation == "swiglu":
        return parts[0], parts[1], _sigmoid(parts[0]).mul_(parts[0]).mul_(parts[1])
    return parts[0], F.gelu(parts[0])


def _gelu_backward(
    grad_MD: Tensor,
    x_MD: Tensor,
    hidden: tuple[Tensor, ...],
    weights: Sequence[Mapping[str, Tensor]],
    target: WeightGradient | None,
    groups: Sequence[Group],
) -> Tensor:
    before_MH, after_MH = hidden
    back_MH = torch.empty_like(before_MH)
    for group, fields in zip(groups, weights, strict=True):
        _rows_times(grad_MD, fields["w_out"].t(), None, group, into=back_MH)
        if target is not None:
            target.add(group, "w_out", after_MH, grad_MD, bias="b_out")
    back_MH = torch.ops.aten.gelu_backward(back_MH, before_MH)
    grad_x_MD = grad_MD  # reuse the memory; the content is no longer needed
    for group, fields in zip(groups, weights, strict=True):
        _rows_times(back_MH, fields["w_in"].t(), None, group, into=grad_x_MD)
        if target is not None:
            target.add(group, "w_in", x_MD, back_MH, bias="b_in")
    return grad_x_MD


def _swiglu_backward(
    grad_MD: Tensor,
    x_MD: Tensor,
    hidden: tuple[Tensor, ...],
    weights: Sequence[Mapping[str, Tensor]],
    target: WeightGradient | None,
    groups: Sequence[Group],
) -> Tensor:
    gate_MH, up_MH, product_MH = hidden
    back_MH = torch.empty_like(gate_MH)
    for group, fields in zip(groups, weights, strict=True):
        _rows_times(grad_MD, fields["w_down"].t(), None, group, into=back_MH)
        if target is not None:
            target.add(group, "w_down", product_MH, grad_MD)
    sigmoid_MH = _sigmoid(gate_MH)
    back_up_MH = (back_MH * gate_MH).mul_(sigmoid_MH)
    # The slope of x * sigmoid(x) is sigmoid(x) * (1 + x * (1 - sigmoid(x))).
    slope_MH = (1 - sigmoid_MH).mul_(gate_MH).add_(1).mul_(sigmoid_MH)
    back_gate_MH = back_MH.mul_(up_MH).mul_(slope_MH)
    grad_x_MD = grad_MD  # reuse the memory; the content is no longer needed
    for group, fields in zip(groups, weights, strict=True):
        _rows_times(back_gate_MH, fields["w_gate"].t(), None, group, into=grad_x_MD)
        _rows_times(back_up_MH, fields["w_up"].t(), None, group, into=grad_x_MD, add=True)
        if target is not None:
            target.add(group, "w_gate", x_MD, back_gate_MH)
            target.add(group, "w_up", x_MD, back_up_MH)
    return grad_x_MD


def _sigmoid(x_MH: Tensor) -> Tensor:
    """Sigmoid whose result for an element does not depend on its position in the tensor.

    On the CPU, PyTorch's fused sigmoid and silu compute the last few elements differently.
    """
    if x_MH.is_cuda:
        return torch.sigmoid(x_MH)
    if x_MH.dtype in (torch.bfloat16, torch.float16):
        return torch.sigmoid(x_MH.float()).to(x_MH.dtype)
    return torch.neg(x_MH).exp_().add_(1).reciprocal_()


def _weights(
    weight_SP: Tensor, groups: Sequence[Group], layout: ExpertLayout, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """The fields of each group's expert, cast to ``dtype``."""
    return [layout.views(weight_SP[group.slot].to(dtype)) for group in groups]


def _rows_times(
    a_MK: Tensor,
    b_KN: Tensor,
    bias_N: Tensor | None,
    group: Group,
    *,
    into: Tensor,
    add: bool = False,
) -> None:
    """Compute ``into[group] = a[group] @ b (+ bias)``; pads small groups to ``MIN_ROWS`` rows.

    With ``add`` the product is added to ``into`` instead.
    """
    rows, result = a_MK[group.begin : group.end], into[group.begin : group.end]
    num_rows = group.end - group.begin
    small = num_rows < MIN_ROWS
    if small:
        padded = rows.new_zeros(MIN_ROWS, rows.shape[1])
        padded[:num_rows] = rows
        rows, kept = padded, result
        result = into.new_zeros(MIN_ROWS, into.shape[1])
        result[:num_rows] = kept
    for begin in range(0, b_KN.shape[0], _depth(b_KN)):
        inner = slice(begin, begin + _depth(b_KN))
        if begin or add:
            result.addmm_(rows[:, inner], b_KN[inner])
        elif bias_N is None:
            torch.mm(rows[:, inner], b_KN[inner], out=result)
        else:
            torch.addmm(bias_N, rows[:, inner], b_KN[inner], out=result)
    if small:
        into[group.begin : group.end] = result[:num_rows]


def _depth(b_KN: Tensor) -> int:
    """Largest part of K for one product such that a row's bits do not depend on other rows."""
    deep = b_KN.device.type == "cpu" and b_KN.stride(-1) == 1 and b_KN.shape[0] > MAX_DEPTH
    return MAX_DEPTH if deep else max(1, b_KN.shape[0])

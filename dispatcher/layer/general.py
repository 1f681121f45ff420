"""Experts of any kind: a differentiable function of rows and of an expert's named tensors.

Each group of rows has an autograd graph of its own, from the rows and the expert's tensors to the
output. The backward differentiates these graphs and adds the gradients to the flat buffer, as the
hand-written arithmetic of ``compute.py`` does.

Shapes: M rows in all groups, D model width, S slots, P trained and F frozen elements per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dispatcher.layer.compute import MIN_ROWS, Group, WeightGradient, arithmetic_dtype
from dispatcher.layer.layout import RowLayout

ExpertFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """The tensors of all experts on this rank.

    Attributes:
        weight: Trained tensors, [S, P].
        layout: Layout of a row of ``weight``.
        frozen: Frozen tensors, [S, F]; None if there are none.
        frozen_layout: Layout of a row of ``frozen``.
    """

    weight: Tensor
    layout: RowLayout
    frozen: Tensor | None = None
    frozen_layout: RowLayout | None = None


@dataclass(slots=True)
class Graph:
    """The graph of one group: ``out`` is a function of ``rows`` and of the ``trained`` tensors."""

    out: Tensor
    rows: Tensor
    trained: dict[str, Tensor]


def run_forward(
    x_MD: Tensor,
    tensors: Tensors,
    groups: Sequence[Group],
    run: ExpertFunction,
    *,
    keeps_graphs: bool,
) -> tuple[Tensor, list[Graph]]:
    """Apply each group's expert to its rows.

    Args:
        x_MD: Rows grouped by expert.
        tensors: Tensors of the experts, by slot.
        groups: Row range of each expert.
        run: Computes one expert.
        keeps_graphs: Whether a backward follows.

    Returns:
        The output [M, D], and the graphs for ``run_backward`` if they are kept.

    Raises:
        ValueError: ``run`` did not return one row of width D for each row.
    """
    rows_MD = x_MD.to(arithmetic_dtype(x_MD))
    y_MD = torch.empty_like(x_MD)
    graphs = []
    for group in groups:
        # These graphs do not belong to the graph around the layer. Hooks on that graph, for example
        # of activation checkpointing, must not see their tensors: their number differs by rank.
        with torch.set_grad_enabled(keeps_graphs), _without_hooks():
            graph = _apply(rows_MD[group.begin : group.end].detach(), group.slot, tensors, run)
        y_MD[group.begin : group.end] = graph.out.detach()
        if keeps_graphs:
            graphs.append(graph)
    return y_MD, graphs


def _apply(rows: Tensor, slot: int, tensors: Tensors, run: ExpertFunction) -> Graph:
    if torch.is_grad_enabled():
        rows.requires_grad_()
    is_trained = torch.is_grad_enabled() and tensors.weight.requires_grad
    trained = {
        name: view.to(rows.dtype).requires_grad_(is_trained)
        for name, view in tensors.layout.views(tensors.weight.detach()[slot]).items()
    }
    fields = dict(trained)
    if tensors.frozen is not None and tensors.frozen_layout is not None:
        views = tensors.frozen_layout.views(tensors.frozen.detach()[slot])
        fields |= {name: view.to(rows.dtype) for name, view in views.items()}
    # A product of few rows uses other kernels, whose results differ in the last bits. With padding
    # a row's result does not depend on how many rows came along.
    num_rows = rows.shape[0]
    padded = F.pad(rows, (0, 0, 0, MIN_ROWS - num_rows)) if num_rows < MIN_ROWS else rows
    out = run(padded, fields)
    if not isinstance(out, Tensor) or out.shape != padded.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"an expert must return a row of width {padded.shape[1]} for each row: got {found} "
            f"for rows {tuple(padded.shape)}"
        )
    return Graph(out[:num_rows], rows, trained)


def run_backward(
    grad_MD: Tensor,
    graphs: Sequence[Graph],
    groups: Sequence[Group],
    tensors: Tensors,
    grad_SP: Tensor | None,
    *,
    written: set[int] | None = None,
) -> Tensor:
    """Return the gradient of the rows, and add the gradients of trained tensors to ``grad_SP``.

    Args:
        grad_MD: Gradient of the output rows; its memory is reused for the result.
        graphs: The graphs of ``run_forward``; used up.
        groups: Row range of each expert.
        tensors: Tensors of the experts.
        grad_SP: Buffer of the gradients; None if they are not wanted.
        written: As in ``compute.experts_backward``.
    """
    target = None
    if grad_SP is not None:
        target = WeightGradient(grad_SP, tensors.layout, groups, written)
    for group, graph in zip(groups, graphs, strict=True):
        trained = graph.trained if target is not None else {}
        grad = grad_MD[group.begin : group.end]
        grads = _gradients(graph.out, [graph.rows, *trained.values()], grad)
        grad.copy_(grads[0])
        if target is not None:
            target.put(group, dict(zip(trained, grads[1:], strict=True)))
    return grad_MD


def _gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> Sequence[Tensor]:
    if not out.requires_grad:  # the function used none of its arguments
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(
        out, inputs, grad.to(out.dtype), allow_unused=True, materialize_grads=True
    )


@contextmanager
def _without_hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


class RandomState:
    """The state of the random numbers that a recomputation must see again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context in which random numbers are those that followed this state."""
        devices = [] if self._cuda is None else [self._device]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield

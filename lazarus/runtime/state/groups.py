"""The optimizer's parameter groups, and the vectors among an expert's fields.

An optimizer treats matrices and vectors differently: vectors (biases, scales) are not decayed. All
fields of an expert lie in one row of its bank's weight, so the vectors of a bank are also given to
the optimizer as a parameter of their own, in the group of vectors. Around each optimizer step,
values, gradients and state of the vectors are copied there and back. What is kept, sent and saved
remains the bank's weight and its state. See docs/adr/0015-vectors-of-experts.md.

Shapes: S slots, P parameters of one expert, V of these in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dispatcher.layer.layout import ROW_MULTIPLE
from lazarus.errors import UserMistakeError
from lazarus.model.experts import ExpertBank
from lazarus.runtime.state.dense import Named
from lazarus.runtime.state.flat_bytes import state_tensors

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]


def make_optimizer(
    factory: OptimizerFactory,
    *,
    dense: Named,
    banks: Sequence[tuple[str, ExpertBank]],
    vectors: Sequence[tuple[str, VectorFields]],
) -> Optimizer:
    """Call the user's factory with groups of all trained parameters, and check the result.

    Args:
        factory: Makes an optimizer from parameter groups.
        dense: Trained dense parameters.
        banks: Trained banks, by the path of their layer.
        vectors: The vectors of these banks.

    Raises:
        UserMistakeError: Nothing is trained, or the optimizer has other parameters than those.
    """
    matrices = [(name, p) for name, p in dense if p.dim() >= 2]
    plain = [(name, p) for name, p in dense if p.dim() < 2]
    plain += [(f"{path}.experts.vectors", fields.parameter) for path, fields in vectors]
    experts = [(f"{path}.experts.weight", bank.weight) for path, bank in banks]
    groups = [
        _group("dense", matrices),
        _group("no_decay", plain, weight_decay=0.0),
        _group("expert", experts),
    ]
    given = [group for group in groups if group["params"]]
    if not given:
        raise UserMistakeError(
            "every parameter of the model is frozen, so there is nothing to train; "
            "requires_grad_() in the model function makes parameters trained"
        )
    optimizer = factory(given)
    _check(optimizer, [*matrices, *plain, *experts])
    return optimizer


def _group(kind: str, named: Named, **settings: float) -> dict[str, Any]:
    names = [name for name, _ in named]
    return {"params": [p for _, p in named], "names": names, "name": kind, **settings}


def _check(optimizer: Optimizer, given: Named) -> None:
    names = {id(p): name for name, p in given}
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    missing = [name for ident, name in names.items() if ident not in found]
    if missing:
        raise UserMistakeError(
            f"the optimizer was not given {', '.join(missing[:8])}, which would never change; to "
            f"leave parameters as they are, freeze them when the model is built "
            f"(requires_grad_(False))"
        )
    if len(found) != len(names):
        raise UserMistakeError(
            "the optimizer has parameters that are not in the groups which its factory was given"
        )


class VectorFields:
    """The vectors of a bank's experts, [S, V], as a parameter that the optimizer treats as such."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self._spans = _vector_spans(bank)
        self.parameter = nn.Parameter(self._columns(bank.weight.detach()))
        self.parameter.grad = torch.zeros_like(self.parameter)

    @torch.no_grad()
    def take(self, optimizer: Optimizer) -> None:
        """Copy values, gradients and optimizer state of the vectors from the bank's weight."""
        weight, own = self._bank.weight, self.parameter
        assert weight.grad is not None
        own.data = self._columns(weight.detach())
        own.grad = self._columns(weight.grad)
        state = optimizer.state[own]
        for key, value in optimizer.state[weight].items():
            if not isinstance(value, Tensor):
                state[key] = value
            elif value.shape == weight.shape:
                state[key] = self._columns(value)
            else:
                state[key] = value.clone()

    @torch.no_grad()
    def give_back(self, optimizer: Optimizer) -> None:
        """Copy values and optimizer state of the vectors back into the bank's weight."""
        weight, own = self._bank.weight, self.parameter
        self._put(weight.detach(), own.detach())
        state = optimizer.state[own]
        for key, rows in state_tensors(optimizer, weight):
            self._put(rows, state[key])

    def _columns(self, rows_SP: Tensor) -> Tensor:
        """The vectors, padded as rows of a bank are.

        Kernels compute the last elements of a tensor differently. Without the padding the bits of
        an expert would depend on its slot.
        """
        parts = [rows_SP[:, begin:end] for begin, end in self._spans]
        numel = sum(end - begin for begin, end in self._spans)
        parts.append(rows_SP.new_zeros(len(rows_SP), -numel % ROW_MULTIPLE))
        return torch.cat(parts, dim=1)

    def _put(self, rows_SP: Tensor, vectors_SV: Tensor) -> None:
        at = 0
        for begin, end in self._spans:
            rows_SP[:, begin:end] = vectors_SV[:, at : at + end - begin]
            at += end - begin


def vector_fields(banks: Iterable[tuple[str, ExpertBank]]) -> list[tuple[str, VectorFields]]:
    """The vectors of each bank that has any, by the path of its layer."""
    return [(path, VectorFields(bank)) for path, bank in banks if _vector_spans(bank)]


def _vector_spans(bank: ExpertBank) -> list[tuple[int, int]]:
    """Begin and end, in a row, of each field that is a vector or a single number."""
    layout = bank.layout
    return [
        (layout.offsets[name], layout.offsets[name] + math.prod(shape))
        for name, shape in layout.fields.items()
        if len(shape) < 2
    ]

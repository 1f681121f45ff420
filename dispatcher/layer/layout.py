"""Layout of one expert's parameters in a row of the expert bank.

Shapes: D model width, H hidden width, P parameters per row with padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

Activation = Literal["gelu", "swiglu"]
ROW_MULTIPLE = 16  # fp32 elements: every row starts at a 64-byte boundary


class RowLayout:
    """Named tensors of one expert, stored one after the other in a flat row.

    Attributes:
        fields: Shape of each tensor, in the order of the row.
        dim: Model width D.
    """

    fields: Mapping[str, tuple[int, ...]]
    dim: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Offset of each field in the row, in elements."""
        offsets, at = {}, 0
        for name, shape in self.fields.items():
            offsets[name] = at
            at += math.prod(shape)
        return offsets

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of one expert, without padding."""
        return sum(math.prod(shape) for shape in self.fields.values())

    @cached_property
    def row_numel(self) -> int:
        """P: elements of one row of the bank, padding included."""
        return -(-self.num_parameters // ROW_MULTIPLE) * ROW_MULTIPLE

    def views(self, row_P: Tensor) -> dict[str, Tensor]:
        """Return the fields as views into a row [P]."""
        return {
            name: row_P[self.offsets[name] : self.offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self.fields.items()
        }


class TensorLayout(RowLayout):
    """Layout of experts of any kind: each is a set of named tensors of any shapes.

    Args:
        fields: Shape of each tensor of one expert. Their order is that of the row. Empty for
            experts that have no tensors of this sort, such as trained ones.
        dim: Model width D: the width of the rows that an expert takes and returns.

    Raises:
        ValueError: A name is empty, or a size is < 1.
    """

    def __init__(self, fields: Mapping[str, tuple[int, ...]], *, dim: int) -> None:
        self.fields = {name: tuple(int(n) for n in shape) for name, shape in fields.items()}
        self.dim = dim
        for name, shape in self.fields.items():
            if not name or min(shape, default=1) < 1:
                raise ValueError(f"expert tensor {name!r} of shape {shape}: sizes must be >= 1")
        if dim < 1:
            raise ValueError(f"experts of width {dim}: it must be >= 1")

    def __repr__(self) -> str:
        return f"TensorLayout({self.fields}, dim={self.dim})"


@dataclass(frozen=True, kw_only=True)
class ExpertLayout(RowLayout):
    """The weight matrices and biases of one expert, stored one after the other in a flat row.

    Args:
        activation: "gelu" (two matrices) or "swiglu" (three, no biases).
        dim: Model width D.
        hidden: Hidden width H of the expert.
        bias: Whether a gelu expert has biases.

    Raises:
        ValueError: Unknown activation, swiglu with biases, or a width < 1.
    """

    activation: Activation
    dim: int
    hidden: int
    bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("gelu", "swiglu"):
            raise ValueError(f"unknown activation {self.activation!r}; known: gelu, swiglu")
        if self.activation == "swiglu" and self.bias:
            raise ValueError("swiglu experts have no biases; use activation='gelu' or bias=False")
        if min(self.dim, self.hidden) < 1:
            raise ValueError(f"expert of {self.dim} x {self.hidden}: both must be >= 1")

    @cached_property
    def fields(self) -> Mapping[str, tuple[int, ...]]:  # type: ignore[override]  # computed once
        """Shape of each field of one expert."""
        d, h = self.dim, self.hidden
        if self.activation == "swiglu":
            return {"w_gate": (d, h), "w_up": (d, h), "w_down": (h, d)}
        if self.bias:
            return {"w_in": (d, h), "b_in": (h,), "w_out": (h, d), "b_out": (d,)}
        return {"w_in": (d, h), "w_out": (h, d)}

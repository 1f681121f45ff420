"""How one expert's parameters lie in its row of the bank.

Shapes: D model width, H hidden width, P parameters per row with padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

Activation = Literal["gelu", "swiglu"]
ROW_MULTIPLE = 16  # floats: every row starts on a 64-byte line, so each slot computes alike


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Fields of one expert, one after the other in record order."""

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
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Shape of each field of one expert."""
        d, h = self.dim, self.hidden
        if self.activation == "swiglu":
            return {"w_gate": (d, h), "w_up": (d, h), "w_down": (h, d)}
        if self.bias:
            return {"w_in": (d, h), "b_in": (h,), "w_out": (h, d), "b_out": (d,)}
        return {"w_in": (d, h), "w_out": (h, d)}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each field begins in the row."""
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
        """The fields as views into one row."""
        return {
            name: row_P[self.offsets[name] : self.offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self.fields.items()
        }

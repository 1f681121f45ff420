"""The expert weights that one rank holds, addressed by global expert ids.

Shapes: S slots, P parameters in a row (padded), D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dispatcher.layer.layout import Activation, ExpertLayout

_deferred: ContextVar[bool] = ContextVar("deferred_experts", default=False)
_MASK = (1 << 64) - 1


@contextmanager
def deferred_experts() -> Iterator[None]:
    """Context in which new banks hold no expert; ``allocate`` and ``assign`` fill them later."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


class ExpertBank(nn.Module):
    """The experts of one layer that this rank holds: a weight [S, P] with one expert per slot.

    Args:
        dim: Model width.
        hidden: Hidden width of one expert.
        num_experts: Experts of the layer, whether or not this rank holds them.
        activation: "gelu" or "swiglu".
        bias: Whether gelu experts have biases.
        init_std: Standard deviation of initial weights; None means 1 / sqrt(fan in).
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        num_experts: int,
        activation: Activation = "swiglu",
        bias: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.layout = ExpertLayout(activation=activation, dim=dim, hidden=hidden, bias=bias)
        self.num_experts = num_experts
        self.init_std = init_std
        # One draw whatever the number of experts, so that a seeded build is the same on every rank.
        self.key = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
        self.expert_of_slot: list[int] = []
        device = torch.empty(0).device  # honours `with torch.device(...)`
        self.weight = nn.Parameter(torch.empty(0, self.layout.row_numel, device=device))
        if not _deferred.get():
            self._hold_all(device)

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Per-expert shape of each field, in record order."""
        return self.layout.fields

    @property
    def num_parameters(self) -> int:
        """Parameters of one expert, without padding."""
        return self.layout.num_parameters

    def allocate(self, *, num_slots: int, device: torch.device | str) -> None:
        """Replace weight and gradient by ``num_slots`` rows of zeros, all slots empty."""
        shape = (num_slots, self.layout.row_numel)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.weight.grad = torch.zeros_like(self.weight)
        self.expert_of_slot = [-1] * num_slots

    def assign(self, slot: int, expert: int) -> None:
        """Set which expert is in ``slot``; -1 empties the slot. The weights are not touched.

        Raises:
            ValueError: No such slot or expert, or the expert is already in another slot.
        """
        if not 0 <= slot < len(self.expert_of_slot):
            raise ValueError(f"slot {slot} is not one of {len(self.expert_of_slot)} slots")
        if not -1 <= expert < self.num_experts:
            raise ValueError(f"expert {expert} is not one of {self.num_experts} experts")
        if expert >= 0 and expert in self.expert_of_slot[:slot] + self.expert_of_slot[slot + 1 :]:
            raise ValueError(f"expert {expert} already lives in another slot than {slot}")
        self.expert_of_slot[slot] = expert

    @torch.no_grad()
    def initialise(self, slot: int) -> None:
        """Fill the row of ``slot`` with initial weights, which depend on bank key and expert alone.

        Weights are drawn on the CPU, so that they are the same on every device.

        Raises:
            ValueError: The slot is empty.
        """
        expert = self.expert_of_slot[slot]
        if expert < 0:
            raise ValueError(f"slot {slot} is empty; assign an expert first")
        generator = torch.Generator(device="cpu").manual_seed(_mixed(self.key, expert))
        row_P = torch.zeros(self.layout.row_numel, dtype=self.weight.dtype, device="cpu")
        for name, view in self.layout.views(row_P).items():
            if name.startswith("w_"):
                std = view.shape[0] ** -0.5 if self.init_std is None else self.init_std
                view.normal_(0.0, std, generator=generator)
        self.weight[slot].copy_(row_P)

    def field_views(self, row_P: Tensor) -> dict[str, Tensor]:
        """Views of one row, by field name."""
        return self.layout.views(row_P)

    def row(self, expert: int) -> Tensor:
        """The weights of ``expert``, [P].

        Raises:
            KeyError: This rank does not hold the expert.
        """
        if expert not in self.expert_of_slot:
            raise KeyError(f"expert {expert} is not held here; held: {self.expert_of_slot}")
        return self.weight[self.expert_of_slot.index(expert)]

    def extra_repr(self) -> str:
        held = sum(e >= 0 for e in self.expert_of_slot)
        return (
            f"{self.layout.activation}, dim={self.layout.dim}, hidden={self.layout.hidden}, "
            f"experts={self.num_experts}, held={held}"
        )

    def _hold_all(self, device: torch.device) -> None:
        shape = (self.num_experts, self.layout.row_numel)
        self.weight = nn.Parameter(torch.zeros(shape, device=device))
        self.expert_of_slot = list(range(self.num_experts))
        if device.type != "meta":
            for slot in range(self.num_experts):
                self.initialise(slot)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Initialise rows when a bank built on the meta device gets real memory (``to_empty``)."""
        was_meta = self.weight.is_meta
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.weight.is_meta:
            for slot, expert in enumerate(self.expert_of_slot):
                if expert >= 0:
                    self.initialise(slot)
        return result


def _mixed(key: int, expert: int) -> int:
    """A well-spread 63-bit seed from two integers. Source: the splitmix64 finaliser."""
    z = (key + (expert + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & ((1 << 63) - 1)

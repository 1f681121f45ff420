"""The expert weights that one rank holds, addressed by global expert ids.

Shapes: S slots, P trained and F frozen parameters in a row (padded), D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from dispatcher.layer.layout import Activation, ExpertLayout, RowLayout, TensorLayout
from lazarus.errors import UserMistakeError
from lazarus.model.initial import (
    ExpertSource,
    GivenRows,
    Placeholder,
    Shared,
    drawn,
    placeholder,
    plain_rows,
    require_fields,
)

_deferred: ContextVar[bool] = ContextVar("deferred_experts", default=False)


@contextmanager
def deferred_experts() -> Iterator[None]:
    """Context in which new banks hold no expert; ``allocate`` and ``assign`` fill them later."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


class ExpertBank(nn.Module):
    """The experts of one layer that this rank holds: one expert per slot.

    Trained tensors are rows of ``weight`` [S, P], frozen ones are rows of ``frozen`` [S, F].

    Args:
        dim: Model width.
        hidden: Hidden width of one expert.
        num_experts: Experts of the layer, whether or not this rank holds them.
        activation: "gelu" or "swiglu".
        bias: Whether gelu experts have biases.
        init_std: Standard deviation of initial weights; None means 1 / sqrt(fan in).

    Attributes:
        layout: Layout of the trained tensors of one expert.
        frozen_layout: Layout of the frozen tensors of one expert; None if there are none.
        weight: The trained tensors.
        frozen: The frozen tensors, of any floating dtype; None if there are none.
        expert_of_slot: Expert of each slot, -1 for an empty slot.
    """

    weight: nn.Parameter
    frozen: nn.Parameter | None

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
        layout = ExpertLayout(activation=activation, dim=dim, hidden=hidden, bias=bias)
        self._prepare(layout, num_experts=num_experts, init_std=init_std)

    @classmethod
    def of(
        cls,
        layout: RowLayout,
        *,
        num_experts: int,
        source: ExpertSource | None = None,
        frozen_layout: RowLayout | None = None,
        frozen_dtype: torch.dtype | None = None,
    ) -> Self:
        """Make a bank of experts of any kind.

        Args:
            layout: Layout of the trained tensors of one expert.
            num_experts: Experts of the layer, whether or not this rank holds them.
            source: Gives the initial tensors of an expert by name; see ``source``.
            frozen_layout: Layout of the frozen tensors; None if all are trained.
            frozen_dtype: Dtype of the frozen tensors; None means float32.

        Raises:
            ValueError: The layouts have a name in common, or differ in width.
        """
        bank = cls.__new__(cls)
        nn.Module.__init__(bank)
        bank._prepare(
            layout, num_experts=num_experts, source=source, frozen_layout=frozen_layout,
            frozen_dtype=frozen_dtype,
        )  # fmt: skip
        return bank

    def _prepare(
        self,
        layout: RowLayout,
        *,
        num_experts: int,
        init_std: float | None = None,
        source: ExpertSource | None = None,
        frozen_layout: RowLayout | None = None,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        if frozen_layout is not None:
            twice = sorted(set(layout.fields) & set(frozen_layout.fields))
            if twice or layout.dim != frozen_layout.dim:
                raise ValueError(
                    f"trained and frozen tensors of an expert overlap in {twice} or differ in "
                    f"width: {layout}, {frozen_layout}"
                )
        self.layout, self.frozen_layout = layout, frozen_layout
        self.num_experts, self.init_std = num_experts, init_std
        self._source = Shared(source)
        # One draw whatever the number of experts, so that a seeded build is the same on every rank.
        self.key = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
        self.expert_of_slot: list[int] = []
        device = torch.empty(0).device  # honours `with torch.device(...)`
        self.weight = self._no_rows(layout, torch.float32, device)
        self.frozen = None
        if frozen_layout is not None:
            self.frozen = self._no_rows(frozen_layout, frozen_dtype, device)
            self.frozen.requires_grad_(False)
        if not _deferred.get():
            self.hold_all(device=device)

    def _no_rows(
        self, layout: RowLayout, dtype: torch.dtype | None, device: torch.device
    ) -> nn.Parameter:
        rows = torch.empty(0, layout.row_numel, dtype=dtype, device=device)
        if self.source is not None or not layout.fields or not _deferred.get():
            return nn.Parameter(rows, requires_grad=bool(layout.fields))
        return placeholder(rows, layout=layout, num_experts=self.num_experts, initial=self.initial)

    @property
    def source(self) -> ExpertSource | None:
        """Function that gives the initial tensors of an expert by name; None: they are drawn.

        The function is called when a slot is filled, on the rank that holds the slot; slots that
        are filled already keep their values. A tensor may have any dtype and device.
        """
        return self._source.value

    @source.setter
    def source(self, source: ExpertSource | None) -> None:
        self._source = Shared(source)

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Per-expert shape of each tensor: the trained ones in record order, then the frozen."""
        frozen = {} if self.frozen_layout is None else self.frozen_layout.fields
        return dict(self.layout.fields) | dict(frozen)

    @property
    def num_parameters(self) -> int:
        """Parameters of one expert, trained and frozen, without padding."""
        frozen = 0 if self.frozen_layout is None else self.frozen_layout.num_parameters
        return self.layout.num_parameters + frozen

    @property
    def is_frozen(self) -> bool:
        """Whether no tensor of the experts is trained."""
        return not self.layout.fields

    def allocate(self, *, num_slots: int, device: torch.device | str) -> None:
        """Replace weight and gradient by ``num_slots`` rows of zeros, all slots empty.

        What the model's builder wrote to a deferred bank becomes its ``source``, and so do the
        rows of a bank that holds every expert. A bank whose weight needs no gradient is frozen
        first.
        """
        self._take_over()
        if len(self.expert_of_slot) == len({*self.expert_of_slot} - {-1}) == self.num_experts:
            order = [self.expert_of_slot.index(expert) for expert in range(self.num_experts)]
            self._become_source([(rows.detach()[order], layout) for rows, layout in self._banks()])
        if not self.weight.requires_grad:
            self.freeze()
        shape = (num_slots, self.layout.row_numel)
        weight = torch.zeros(shape, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight, requires_grad=not self.is_frozen)
        if not self.is_frozen:
            self.weight.grad = torch.zeros_like(self.weight)
        if self.frozen is not None and self.frozen_layout is not None:
            frozen = torch.zeros(
                num_slots, self.frozen_layout.row_numel, dtype=self.frozen.dtype, device=device
            )
            self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.expert_of_slot = [-1] * num_slots

    def hold_all(self, *, device: torch.device | str = "cpu") -> None:
        """Hold every expert, each in the slot of its id, with initial values."""
        self.allocate(num_slots=self.num_experts, device=device)
        self.weight.grad = None
        self.expert_of_slot = list(range(self.num_experts))
        if not self.weight.is_meta:
            for slot in range(self.num_experts):
                self.initialise(slot)

    def freeze(self, *, dtype: torch.dtype | None = None) -> None:
        """Make all tensors of the experts frozen ones, which get neither gradients nor moments.

        Args:
            dtype: Dtype of the frozen tensors; None keeps that of the tensors frozen before, and
                float32 if there are none.
        """
        if self.is_frozen:
            return
        self._take_over()
        layout, old, trained = self.layout, self.frozen, self.weight.detach()
        if old is None:
            rows = trained.to(dtype or trained.dtype)
        else:
            layout = TensorLayout(self.fields, dim=layout.dim)
            rows = old.new_zeros(len(trained), layout.row_numel, dtype=dtype or old.dtype)
            for slot, row in enumerate(rows):
                values = self.values(slot)
                for name, view in layout.views(row).items():
                    view.copy_(values[name])
        self.layout, self.frozen_layout = TensorLayout({}, dim=layout.dim), layout
        self.frozen = nn.Parameter(rows, requires_grad=False)
        self.weight = nn.Parameter(trained.new_empty(len(rows), 0), requires_grad=False)

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
        """Fill the rows of ``slot`` with initial values.

        They come from ``source``. Without a source they are drawn on the CPU, so that they are the
        same on every device, and depend on bank key and expert alone.

        Raises:
            ValueError: The slot is empty, or the source's tensors do not fit.
        """
        expert = self.expert_of_slot[slot]
        if expert < 0:
            raise ValueError(f"slot {slot} is empty; assign an expert first")
        given = self.initial(expert)
        for bank, layout in self._banks():
            row = torch.zeros(layout.row_numel, dtype=bank.dtype, device="cpu")
            for name, view in layout.views(row).items():
                view.copy_(given[name])
            bank[slot].copy_(row)

    def initial(self, expert: int) -> Mapping[str, Tensor]:
        """The initial tensors of an expert, by name.

        Raises:
            ValueError: The source's tensors do not fit.
        """
        if self.source is None:
            return drawn(expert, self.fields, key=self.key, std=self.init_std)
        given = self.source(expert)
        require_fields(given, self.fields, expert=expert)
        return given

    def field_views(self, row_P: Tensor) -> dict[str, Tensor]:
        """Views of one row of trained tensors, by name."""
        return self.layout.views(row_P)

    def values(self, slot: int) -> dict[str, Tensor]:
        """Views of all tensors of the expert in ``slot``, by name; the frozen ones come last."""
        found: dict[str, Tensor] = {}
        for rows, layout in self._banks():
            found |= layout.views(rows.detach()[slot])
        return found

    def row(self, expert: int) -> Tensor:
        """The trained tensors of ``expert``, [P].

        Raises:
            KeyError: This rank does not hold the expert.
        """
        if isinstance(self.weight, Placeholder):  # the builder of a run's model may set any expert
            return self.weight[expert]
        if expert not in self.expert_of_slot:
            raise KeyError(f"expert {expert} is not held here; held: {self.expert_of_slot}")
        return self.weight[self.expert_of_slot.index(expert)]

    def extra_repr(self) -> str:
        held = sum(e >= 0 for e in self.expert_of_slot)
        return f"{self.frozen_layout or self.layout}, experts={self.num_experts}, held={held}"

    def _take_over(self) -> None:
        """Make what the builder wrote to a bank without slots the source of the experts.

        Raises:
            UserMistakeError: The builder left rows of another number or size.
        """
        if self.expert_of_slot:
            return
        parts = []
        for name, (parameter, layout) in zip(("weight", "frozen"), self._banks(), strict=False):
            rows, wanted = plain_rows(parameter), (self.num_experts, layout.row_numel)
            if rows.shape[0] and rows.shape != wanted:
                raise UserMistakeError(f"experts.{name} is {tuple(rows.shape)}, not {wanted}")
            if rows.shape[0] and not rows.is_meta:
                parts.append((rows, layout))
            empty = nn.Parameter(rows.new_empty(0, layout.row_numel), parameter.requires_grad)
            setattr(self, name, empty)
        self._become_source(parts)

    def _become_source(self, parts: Sequence[tuple[Tensor, RowLayout]]) -> None:
        """Take initial values from rows of all experts; tensors that they lack as before."""
        parts = [(rows, layout) for rows, layout in parts if layout.fields and not rows.is_meta]
        if not parts:
            return
        held = {name for _, layout in parts for name in layout.fields}
        rest: ExpertSource | None = None
        if held != set(self.fields):
            rest = self.source or partial(
                drawn, fields=self.fields, key=self.key, std=self.init_std
            )
        self.source = GivenRows(parts, rest)

    def _banks(self) -> list[tuple[nn.Parameter, RowLayout]]:
        """Rows and their layout: the trained ones, then the frozen ones."""
        found = [(self.weight, self.layout)]
        if self.frozen is not None and self.frozen_layout is not None:
            found.append((self.frozen, self.frozen_layout))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load all experts even if the bank holds none yet, and frozen ones into a trained bank."""
        weight, frozen = prefix + "weight", prefix + "frozen"
        if self.frozen is None and frozen in state_dict and not state_dict[weight].shape[1]:
            state_dict[weight] = state_dict.pop(frozen)  # a run freezes a bank when it begins
        if not self.expert_of_slot:
            for name in ("weight", "frozen"):
                given, own = state_dict.get(prefix + name), getattr(self, name)
                if own is None or given is None or given.shape[:1] != (self.num_experts,):
                    continue
                setattr(self, name, nn.Parameter(given.detach().clone(), own.requires_grad))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Initialise rows when a bank built on the meta device gets real memory (``to_empty``)."""
        was_meta = self.weight.is_meta
        # Placeholders stay as they are: `allocate` decides on device and dtype.
        kept = {n: p for n, p in self._parameters.items() if isinstance(p, Placeholder)}
        for name in kept:
            self._parameters[name] = None
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters.update(kept)
        if was_meta and not self.weight.is_meta:
            for slot, expert in enumerate(self.expert_of_slot):
                if expert >= 0:
                    self.initialise(slot)
        return result

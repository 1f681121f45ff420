"""Initial values of experts: drawn from a key, given by a source, or set by the model's builder.

Shapes: E experts, P parameters in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dispatcher.layer.layout import RowLayout
from lazarus.errors import UserMistakeError

ExpertSource = Callable[[int], Mapping[str, Tensor]]
_MASK = (1 << 64) - 1


def drawn(
    expert: int, fields: Mapping[str, tuple[int, ...]], *, key: int, std: float | None
) -> dict[str, Tensor]:
    """Random initial tensors of one expert, fp32 on the CPU; vectors and numbers are zeros.

    Args:
        expert: Id of the expert.
        fields: Shape of each tensor.
        key: Key of the bank.
        std: Standard deviation; None means 1 / sqrt(first size).
    """
    generator = torch.Generator(device="cpu").manual_seed(_mixed(key, expert))
    found = {}
    for name, shape in fields.items():
        found[name] = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if len(shape) > 1:
            scale = shape[0] ** -0.5 if std is None else std
            found[name].normal_(0.0, scale, generator=generator)
    return found


def require_fields(
    given: Mapping[str, Tensor], fields: Mapping[str, tuple[int, ...]], *, expert: int
) -> None:
    """Check that the tensors of an expert have the names and shapes of ``fields``.

    Raises:
        UserMistakeError: They do not.
    """
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if found != dict(fields):
        names = sorted(n for n in {*found, *fields} if found.get(n) != fields.get(n))
        raise UserMistakeError(
            f"the source of expert {expert} gives "
            + "; ".join(f"{n}: {found.get(n)}, wanted {fields.get(n)}" for n in names)
        )


class Shared:
    """Holds a value that copies of its owner share."""

    def __init__(self, value: ExpertSource | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class GivenRows:
    """A source whose tensors are views into rows that hold all experts.

    Args:
        parts: Rows [E, P] and their layout.
        rest: Gives the tensors that the rows do not hold; None if there are none.
    """

    def __init__(
        self, parts: Sequence[tuple[Tensor, RowLayout]], rest: ExpertSource | None
    ) -> None:
        self._parts, self._rest = tuple(parts), rest

    def __call__(self, expert: int) -> Mapping[str, Tensor]:
        found = {} if self._rest is None else dict(self._rest(expert))
        for rows, layout in self._parts:
            found |= layout.views(rows[expert])
        return found


class Placeholder(nn.Parameter):
    """Parameter without rows that stands for a bank of experts while a run's model is built.

    As soon as its values are used or written, the parameter gets the initial rows of all experts,
    [E, P]. What the builder of the model writes to them is then part of the initial values.
    """

    _layout: RowLayout
    _initial: Callable[[int], Mapping[str, Tensor]]
    _num_experts: int

    @property
    def is_filled(self) -> bool:
        """Whether the parameter has rows."""
        return bool(self.shape[0])

    def fill(self) -> None:
        """Get the initial rows of all experts."""
        if self.is_filled or self.is_meta:
            return
        shape = (self._num_experts, self._layout.row_numel)
        rows = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for expert, row in enumerate(rows):
            given = self._initial(expert)
            for name, view in self._layout.views(row).items():
                view.copy_(given[name])
        with torch._C.DisableTorchFunctionSubclass():
            self.data = rows

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _HARMLESS:
            for found in _placeholders([*args, *(kwargs or {}).values()]):
                found.fill()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Placeholder:
        """A copy for the copied bank; it has rows only if this one has."""
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunctionSubclass():
            data = self.detach().clone()
        initial = getattr(self._initial, "__func__", None)
        owner = memo.get(id(getattr(self._initial, "__self__", None)))
        copied = self._initial if initial is None or owner is None else initial.__get__(owner)
        twin = placeholder(
            data, layout=self._layout, num_experts=self._num_experts, initial=copied,
            requires_grad=self.requires_grad,
        )  # fmt: skip
        memo[id(self)] = twin
        return twin


def placeholder(
    rows: Tensor,
    *,
    layout: RowLayout,
    num_experts: int,
    initial: Callable[[int], Mapping[str, Tensor]],
    requires_grad: bool = True,
) -> Placeholder:
    """Make a placeholder.

    Args:
        rows: Tensor [0, P] of the parameter's dtype and device.
        layout: Layout of a row.
        num_experts: Experts of the bank.
        initial: Gives the initial tensors of an expert, by name.
        requires_grad: Whether the tensors are trained.
    """
    made = Placeholder(rows, requires_grad)
    made._layout, made._num_experts, made._initial = layout, num_experts, initial
    return made


def plain_rows(parameter: nn.Parameter) -> Tensor:
    """The rows of a parameter as a tensor; of a placeholder, those that it has so far."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _placeholders(values: Sequence[Any]) -> Iterator[Placeholder]:
    for value in values:
        if isinstance(value, Placeholder):
            yield value
        elif isinstance(value, list | tuple):
            yield from _placeholders(value)


def _mixed(key: int, expert: int) -> int:
    """A well-spread 63-bit seed from two integers. Source: the splitmix64 finaliser."""
    z = (key + (expert + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & ((1 << 63) - 1)


# What a builder may ask of a placeholder without using its values.
_HARMLESS = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "grad", "grad_fn", "requires_grad",
        "is_leaf", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested",
        "_version", "_backward_hooks",
    )
} | {
    getattr(Tensor, "requires_grad").__set__,  # noqa: B009 - a descriptor, not a bool
    Tensor.requires_grad_, Tensor.__hash__, Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement,
    Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex,
}  # fmt: skip

"""The interface of states whose tensors are read on access. PURE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from lazarus.checkpoint.format.image import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class StoredState(Protocol):
    """A mapping from names to tensors that knows dtypes and shapes without reading."""

    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Tensor: ...

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; reads no file."""
        ...

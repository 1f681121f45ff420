"""An expert's state in a slot: as rows, as a record of bytes, and as tensors by global name.

A record is the frozen row, if the bank has one, the row of trained weights, and what the optimizer
keeps for these. Records travel when a replica is healed. Frozen weights have no optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lazarus.checkpoint.format.manifest import ALL_PARTS, FROZEN, OPTIMIZER, WEIGHTS
from lazarus.model.experts import ExpertBank
from lazarus.runtime.state.checksums import checksum_of
from lazarus.runtime.state.flat_bytes import as_bytes, state_tensors

Named = tuple[str, str, Tensor]  # part, global name, tensor
FrozenSource = Callable[[int, int], Mapping[str, Tensor]]  # layer, expert -> fields by name


@dataclass(frozen=True)
class ExpertRecords:
    """The experts of one layer on this rank.

    Args:
        bank: The layer's experts.
        optimizer: Keeps state for the bank's weight.
        path: The layer's name in the model.
    """

    bank: ExpertBank
    optimizer: Optimizer
    path: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that each expert has, as a checkpoint stores them."""
        return tuple(part for part, size in self.part_bytes().items() if size)

    def moments(self) -> list[tuple[str, Tensor]]:
        """What the optimizer keeps for the trained weights, [S, P], by key."""
        return [] if self.bank.is_frozen else state_tensors(self.optimizer, self.bank.weight)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept for the experts, in the order of a record; each [S, ...]."""
        frozen = [] if self.bank.frozen is None else [self.bank.frozen.detach()]
        trained = [] if self.bank.is_frozen else [self.bank.weight.detach()]
        return [*frozen, *trained, *(tensor for _, tensor in self.moments())]

    def rows(self, slot: int) -> list[Tensor]:
        """One expert's rows, in the order of a record."""
        return [tensor[slot] for tensor in self.tensors()]

    @property
    def num_bytes(self) -> int:
        """Bytes of a record."""
        return sum(t.shape[1] * t.element_size() for t in self.tensors())

    def part_bytes(self) -> dict[str, int]:
        """Bytes of each part of an expert, padding included."""
        found = dict.fromkeys(ALL_PARTS, 0)
        if self.bank.frozen is not None:
            found[FROZEN] = self.bank.frozen.shape[1] * self.bank.frozen.element_size()
        if not self.bank.is_frozen:
            found[WEIGHTS] = self.bank.weight.shape[1] * self.bank.weight.element_size()
        found[OPTIMIZER] = self.num_bytes - found[WEIGHTS] - found[FROZEN]
        return found

    def read(self, slot: int) -> Tensor:
        """The record of the expert in ``slot``, uint8 on the host."""
        return torch.cat([as_bytes(row).cpu() for row in self.rows(slot)])

    def checksum(self, slot: int) -> int:
        """Fast checksum of the record; never 0."""
        return checksum_of(self.rows(slot))

    def write(self, slot: int, record: Tensor) -> None:
        """Fill a slot from a record."""
        start = 0
        for row in self.rows(slot):
            size = row.numel() * row.element_size()
            as_bytes(row).copy_(record[start : start + size].contiguous().to(row.device))
            start += size

    def initialise(self, slot: int) -> None:
        """Fill a slot with initial weights and an empty optimizer state."""
        self.bank.initialise(slot)
        for _, tensor in self.moments():
            tensor[slot].zero_()

    def record_of(
        self, expert: int, tensors: Mapping[str, Tensor], frozen: Callable[[], Mapping[str, Tensor]]
    ) -> Tensor:
        """Build an expert's record from its tensors.

        Args:
            expert: The expert.
            tensors: The expert's tensors by global name.
            frozen: Gives the frozen fields, which a partial checkpoint or a snapshot lacks.

        Raises:
            KeyError: A tensor is missing.
        """
        rows = [torch.zeros_like(row[0], device="cpu") for row in self.tensors()]
        missing: Mapping[str, Tensor] | None = None
        for part, name, view in self._named(rows, f".{expert}"):
            if part == FROZEN and name not in tensors:
                missing = frozen() if missing is None else missing
                view.copy_(missing[name.rpartition(f".experts.{expert}.")[2]])
            else:
                view.copy_(tensors[name])
        return torch.cat([as_bytes(row) for row in rows])

    def named(self, slot: int, expert: int | str) -> Iterator[Named]:
        """Part, global name and tensor of everything that is kept for one expert.

        Args:
            slot: The expert's slot.
            expert: What stands for the expert in the names.
        """
        return self._named(self.rows(slot), f".{expert}")

    def _named(self, rows: list[Tensor], expert: str) -> Iterator[Named]:
        """Names of the fields in rows that are ordered as ``tensors``; trained weights first."""
        path, bank, left = f"{self.path}.experts{expert}", self.bank, list(rows)
        frozen = None if bank.frozen is None else left.pop(0)
        if not bank.is_frozen:
            for field, view in bank.field_views(left.pop(0)).items():
                yield WEIGHTS, f"model.{path}.{field}", view
        if frozen is not None and bank.frozen_layout is not None:
            for field, view in bank.frozen_layout.views(frozen).items():
                yield FROZEN, f"model.{path}.{field}", view
        for (key, _), row in zip(self.moments(), left, strict=True):
            for field, view in bank.field_views(row).items():
                yield OPTIMIZER, f"optimizer.{key}.{path}.{field}", view

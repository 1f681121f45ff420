"""The committed steps of a run as a sequence that takes 40 bytes per step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from lazarus.record.events import Event
from lazarus.record.typed import StepRecord


class StepHistory(Sequence[StepRecord]):
    """Committed steps in ascending order, each once, with the values of its last commit."""

    def __init__(self) -> None:
        self._step, self._tokens, self._nodes = array("q"), array("q"), array("q")
        self._loss, self._wall_s = array("d"), array("d")

    def add(self, event: Event) -> None:
        """Add a ``step_committed`` event. This and later steps added before are removed."""
        step, loss = int(event["step"]), event["loss"]
        columns = (self._step, self._loss, self._tokens, self._nodes, self._wall_s)
        while self._step and self._step[-1] >= step:
            for column in columns:
                column.pop()
        self._step.append(step)
        self._loss.append(float("nan") if loss is None else float(loss))
        self._tokens.append(int(event["tokens"]))
        self._nodes.append(int(event["num_nodes"]))
        self._wall_s.append(float(event["wall_s"]))

    def __len__(self) -> int:
        return len(self._step)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StepRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | tuple[StepRecord, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return StepRecord(
            step=self._step[index],
            loss=self._loss[index],
            tokens=self._tokens[index],
            num_nodes=self._nodes[index],
            wall_s=self._wall_s[index],
        )

    def __iter__(self) -> Iterator[StepRecord]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

"""The context that user functions get in a worker, and the measures that they log through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

MAX_NAMES = 256  # measures in one run; each costs two lanes of every commit vector


class Measures:
    """Values that ``ctx.log`` collects on one rank in one step, summed over its micro-batches.

    All ranks sum values under one agreed list of names. A name that is not on the list waits for
    the next step, in which all ranks agree again. Values of an abandoned attempt are dropped.
    """

    def __init__(self) -> None:
        self.muted = False  # ghost rounds and evaluations log nothing
        self.names: tuple[str, ...] = ()
        self._sums: dict[str, list[float]] = {}
        self._taken: set[str] = set()  # names in this step's values that ``take`` has returned
        self._waiting: dict[str, list[float]] = {}  # values that the last commit could not include

    def start(self) -> None:
        """Begin a step, or another attempt at the same step."""
        self.muted = False
        self._taken = set()
        self._sums = {name: list(pair) for name, pair in self._waiting.items()}

    def take(self) -> dict[str, tuple[float, float]]:
        """Return the values logged since the last call as pairs (weighted sum, weight)."""
        found = {name: (pair[0], pair[1]) for name, pair in self._sums.items()}
        self._sums = {}
        self._taken |= set(found)
        return found

    def log(self, name: str, value: float, weight: float) -> None:
        """Add ``value`` with ``weight`` to the measure ``name``."""
        if self.muted:
            return
        pair = self._sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(value) * float(weight)
        pair[1] += float(weight)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names that this rank has logged in this step, sorted."""
        return tuple(sorted({*self._sums, *self._taken}))

    @property
    def has_unknown(self) -> bool:
        """Whether this rank has logged a name that is not on the agreed list."""
        return not {*self._sums, *self._taken} <= set(self.names)

    def agree(self, names: Iterable[str]) -> None:
        """Sum values under these names from now on.

        Raises:
            ValueError: There are more than ``MAX_NAMES`` names, or one is not a line of text.
        """
        found = tuple(sorted(names))
        if len(found) > MAX_NAMES:
            raise ValueError(f"ctx.log was given {len(found)} names, at most {MAX_NAMES} are kept")
        wrong = [name for name in found if not name or "\n" in name]
        if wrong:
            raise ValueError(f"ctx.log: {wrong[0]!r} is no name; use one line of text")
        self.names = found

    def lanes(self) -> NDArray[np.float64]:
        """Weighted sum and weight of each agreed name, float64 [2 * names]."""
        pairs = [self._sums.get(name, (0.0, 0.0)) for name in self.names]
        return np.array(pairs, dtype=np.float64).reshape(-1)

    def commit(self) -> None:
        """Forget the committed values; values of names not agreed on wait for the next step."""
        known = set(self.names)
        self._waiting = {name: pair for name, pair in self._sums.items() if name not in known}
        self._sums = {}


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Where a user function runs. Every worker has its own context.

    Rank and world size change with the generation; while the model is built they are -1 and 0.
    The model function must not let its result depend on rank, node or generation: every rank must
    build the same dense weights.

    Attributes:
        rank: This rank in the current generation.
        world_size: Number of ranks.
        node: Number of this rank's machine.
        device: Where the model lives.
        generation: Counts reconfigurations.
        seed: The run's seed.
        dtype: bfloat16, or float32 with ``train.precision = "fp32"``.
    """

    rank: int
    world_size: int
    node: int
    device: torch.device
    generation: int
    seed: int
    dtype: torch.dtype
    measures: Measures = field(default_factory=Measures, repr=False, compare=False)

    def log(self, name: str, value: float, *, weight: float = 1.0) -> None:
        """Log a measure of this step, from the loss, the model or a gradient hook.

        The published value is a weighted mean over all micro-batches and ranks, so it does not
        depend on how the step was shared. It is published with the commit, in ``metrics`` of
        ``step_committed``. Values of an abandoned attempt are dropped.

        Args:
            name: Name of the measure, one line of text.
            value: The value.
            weight: Weight of the value, such as the number of tokens behind it.
        """
        self.measures.log(name, value, weight)

"""What the user's functions are told about the worker they run in, and what they tell it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

MAX_NAMES = 256  # of measures in one run; each costs two lanes of every commit vector


class Measures:
    """What ``ctx.log`` collects on one rank in one step, summed over its micro-batches.

    All ranks sum under one agreed list of names. A name that is not on it yet waits for the next
    step, in which all ranks agree anew; what an abandoned attempt logged is gone.
    """

    def __init__(self) -> None:
        self.muted = False  # ghost rounds and evaluations log nothing
        self.names: tuple[str, ...] = ()
        self._sums: dict[str, list[float]] = {}
        self._waiting: dict[str, list[float]] = {}  # of the last committed step

    def start(self) -> None:
        """A step, or another attempt at it, begins."""
        self.muted = False
        self._sums = {name: list(pair) for name, pair in self._waiting.items()}

    def log(self, name: str, value: float, weight: float) -> None:
        if self.muted:
            return
        pair = self._sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(value) * float(weight)
        pair[1] += float(weight)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of this step on this rank."""
        return tuple(sorted(self._sums))

    @property
    def has_unknown(self) -> bool:
        """Whether a name is not on the agreed list."""
        return not set(self._sums) <= set(self.names)

    def agree(self, names: Iterable[str]) -> None:
        """Sum under these names from now on.

        Raises:
            ValueError: There are more than ``MAX_NAMES``, or one is no line of text.
        """
        found = tuple(sorted(names))
        if len(found) > MAX_NAMES:
            raise ValueError(f"ctx.log was given {len(found)} names, at most {MAX_NAMES} are kept")
        wrong = [name for name in found if not name or "\n" in name]
        if wrong:
            raise ValueError(f"ctx.log: {wrong[0]!r} is no name; use one line of text")
        self.names = found

    def lanes(self) -> NDArray[np.float64]:
        """float64 [2 * names]: weighted sum and weight of each agreed name."""
        pairs = [self._sums.get(name, (0.0, 0.0)) for name in self.names]
        return np.array(pairs, dtype=np.float64).reshape(-1)

    def commit(self) -> None:
        """The step counts: keep only what it could not take along."""
        known = set(self.names)
        self._waiting = {name: pair for name, pair in self._sums.items() if name not in known}
        self._sums = {}


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Runs in every worker. Rank and world size change with the generation: -1 and 0 while built.

    The model function must not let its result depend on rank, node or generation: every rank
    builds the same dense weights.
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
        """Add to a measure of this step, from the loss, the model or a gradient hook.

        Value times weight and weight are summed over micro-batches and ranks; their quotient is
        published with the commit (``metrics`` of ``step_committed``), so it does not depend on how
        the step was shared. An abandoned attempt leaves nothing behind.
        """
        self.measures.log(name, value, weight)

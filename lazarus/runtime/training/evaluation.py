"""Held-out loss of a committed state, computed by all ranks together without changing the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lazarus.control.messages import Evaluated
from lazarus.data.sampler import share, split_rounds
from lazarus.data.units import Units
from lazarus.errors import DataError
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.input.randomness import reseed, undisturbed
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.context import Measures
from lazarus.runtime.training.step import Batching, autocast, checked_loss, move_to
from lazarus.runtime.training.world import World


class Evaluator:
    """Evaluates the same samples in the same order every time, whichever ranks take part."""

    def __init__(
        self,
        replica: Replica,
        data: Any,
        *,
        batching: Batching,
        every: int,
        batches: int,
        collate: Callable[[list[Any]], Any],
        loss: Callable[[nn.Module, Any], Any],
        observer: Observer,
        measures: Measures,
    ) -> None:
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
            raise DataError(
                f"eval_data is {type(data).__name__}; held-out data is map-style, with "
                f"__len__ >= 1 and __getitem__"
            )
        self._replica, self._data, self._batching = replica, data, batching
        self._every, self._batches = every, batches
        self._collate, self._loss = collate, loss
        self._observer, self._measures = observer, measures

    def is_due(self, step: int) -> bool:
        """Whether the state after this step is to be evaluated."""
        return step > 0 and step % self._every == 0

    def run(self, step: int, world: World) -> Evaluated:
        """Compute the held-out loss after ``step``, over all ranks.

        Raises:
            FencedError, CollectiveError: A member is lost; the evaluation is repeated later.
        """
        batch = self._batching.global_batch
        count = min(self._batches * batch, len(self._data))
        parts = []
        world.start_step(step)
        with undisturbed(), self._evaluating(world):
            for first in range(0, count, batch):
                ids = np.arange(first, min(first + batch, count), dtype=np.int64)
                parts += self._global_batch(step, ids, world)
            self._replica.restore_scratch()  # drop what evaluation wrote into buffers
            world.meet()
        rows = torch.stack(parts) if self._batching.units else _in_order(parts)[None]
        rows = rows.to(self._replica.device)
        world.exchange.all_reduce(rows, label="digest")
        total, number = _in_order(list(rows.cpu())).tolist()
        return Evaluated(generation=world.generation, step=step, loss_sum=total, count=number)

    @contextmanager
    def _evaluating(self, world: World) -> Iterator[None]:
        """Context with all modules in evaluation mode; restores each module's mode afterwards."""
        modes = [(module, module.training) for module in self._replica.model.modules()]
        self._measures.muted = True
        self._replica.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._measures.muted = False
            for module, mode in modes:
                module.training = mode
            for context in world.contexts:
                context.ghost = False

    def _global_batch(self, step: int, ids: NDArray[np.int64], world: World) -> list[torch.Tensor]:
        """Sums over this rank's micro-batches; dealt by units, one for each unit of all ranks."""
        rank, size = world.exchange.rank, world.exchange.size
        if self._batching.units is not None:
            units = Units(global_batch=len(ids), unit_size=self._batching.units.unit_size)
            rows = [torch.zeros(2, dtype=torch.float64) for _ in range(units.count)]
            for unit in units.dealt(rank, size):
                samples = [] if unit is None else list(units.samples(unit))
                sums = self._round(step, ids[samples], ids, world)
                if unit is not None:
                    rows[unit] = sums
            return rows
        sizes = share(len(ids), size)
        first, found = sum(sizes[:rank]), []
        for part in split_rounds(sizes, self._batching.micro_batch_size)[rank]:
            found.append(self._round(step, ids[first : first + part], ids, world))
            first += part
        return found

    def _round(
        self, step: int, mine: NDArray[np.int64], ids: NDArray[np.int64], world: World
    ) -> torch.Tensor:
        self._observer.enter("evaluate")
        world.start_round(world.round + 1)
        is_ghost = len(mine) == 0
        chosen = ids[:1] if is_ghost else mine
        self._observer.where.enter("evaluate", chosen)
        reseed(self._batching.seed, step, int(chosen[0]))
        items = [self._data[int(i)] for i in chosen]
        batch = move_to(self._collate(items), self._replica.device)
        for context in world.contexts:
            context.ghost = is_ghost
        with autocast(self._batching.precision, self._replica.device):
            result = self._loss(self._replica.model, batch)
        total, count = checked_loss(result)
        pair = (0.0, 0.0) if is_ghost else (float(total.detach()), count)
        return torch.tensor(pair, dtype=torch.float64)


def _in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        total += part
    return total

"""The three kinds of data as one rank reads them: by index, by pure function, or as a stream.

Shapes: B samples of a step (the global batch), R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lazarus.control.commit.exactly_once import ids_of_step
from lazarus.data.sampler import share
from lazarus.data.stream import (
    Position,
    StreamReader,
    StreamSource,
    rank_sample_numbers,
    shards_of_rank,
    step_sample_numbers,
)
from lazarus.data.units import Units
from lazarus.errors import DataError
from lazarus.runtime.input.positions import decoded_positions, encoded_positions

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShare:
    """The samples of a step.

    Attributes:
        ids_B: Ids of all samples.
        sizes: How many samples each rank takes, shape [R].
        mine: Ids of this rank's samples.
        units: The unit that this rank computes in each round, None for none; None if the step is
            shared by sizes.
    """

    ids_B: NDArray[np.int64]
    sizes: tuple[int, ...]
    mine: NDArray[np.int64]
    units: tuple[int | None, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """This rank's place among ``size`` ranks, for the steps after ``committed``.

    Steps are dealt by ``units`` if these are given, and else shared in proportion to ``speeds``.
    """

    rank: int
    size: int
    committed: int
    speeds: tuple[float, ...] | None = None
    units: Units | None = None


def dealt_share(ids_B: NDArray[np.int64], units: Units, *, rank: int, size: int) -> StepShare:
    """A rank's share of a step that is dealt by units."""
    by_rank = [
        [i for unit in units.dealt(other, size) if unit is not None for i in units.samples(unit)]
        for other in range(size)
    ]
    return StepShare(
        ids_B=ids_B,
        sizes=tuple(len(positions) for positions in by_rank),
        mine=ids_B[by_rank[rank]],
        units=units.dealt(rank, size),
    )


class Source(Protocol):
    """One kind of data. Only ``load`` calls the user's code."""

    num_samples: int  # 0: ids without end; -1: a stream of shards

    def seat(self, seating: RankPlace) -> None: ...
    def share(self, step: int) -> StepShare: ...
    def load(self, step: int, shared: StepShare, *, first: int, size: int) -> Any:
        """Load samples ``first`` to ``first + size`` of this rank's share as one batch.

        With size 0, load a stand-in batch of the right form whose samples do not count.
        """

    def committed(self, step: int) -> None: ...
    def known(self) -> str:
        """What only this rank knows of a stream, as text for ``learn`` on the others."""

    def learn(self, texts: Sequence[str]) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def take_state(self, state: Mapping[str, Any]) -> None: ...


class IndexedSource:
    """Samples by id, as ``data[i]`` or, for a pure function, ``data.batch(step, ids)``.

    Args:
        data: The user's data.
        collate: Makes a batch of a list of samples; not used with ``batch``.
        seed: Seed of the order of samples.
        global_batch: Samples of a step.
        num_samples: Size of the data; 0 for ids without end.
    """

    def __init__(
        self, data: Any, *, collate: Collate, seed: int, global_batch: int, num_samples: int
    ) -> None:
        self._data, self._collate = data, collate
        self._seed, self._global_batch, self.num_samples = seed, global_batch, num_samples
        self._is_pure = not hasattr(data, "__getitem__")
        self._seating = RankPlace(rank=0, size=1, committed=0)

    def seat(self, seating: RankPlace) -> None:
        self._seating = seating

    def share(self, step: int) -> StepShare:
        seating = self._seating
        ids_B = ids_of_step(
            step,
            seed=self._seed,
            global_batch=self._global_batch,
            num_samples=self.num_samples,
        )
        if seating.units is not None:
            return dealt_share(ids_B, seating.units, rank=seating.rank, size=seating.size)
        sizes = share(self._global_batch, seating.size, seating.speeds)
        first = sum(sizes[: seating.rank])
        return StepShare(ids_B=ids_B, sizes=sizes, mine=ids_B[first : first + sizes[seating.rank]])

    def load(self, step: int, shared: StepShare, *, first: int, size: int) -> Any:
        chosen = shared.mine[first : first + size] if size else shared.ids_B[:1]
        if self._is_pure:
            return self._data.batch(step, chosen)
        return self._collate([self._data[int(i)] for i in chosen])

    def committed(self, step: int) -> None:
        pass

    def known(self) -> str:
        return ""

    def learn(self, texts: Sequence[str]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Check that the run's data has the same size as the data here.

        Raises:
            DataError: The sizes differ, so samples would be read twice or never.
        """
        theirs = int(state.get("num_samples", self.num_samples))
        if theirs != self.num_samples:
            raise DataError(
                f"the data has {self.num_samples:,} samples here and {theirs:,} in the run; every "
                f"worker, and a resumed run, must read the same data"
            )


class ShardedSource:
    """A stream of shards: reads this rank's shards, and knows older positions of all shards."""

    num_samples = -1

    def __init__(
        self, source: StreamSource, *, collate: Collate, global_batch: int, num_shards: int,
        shuffle_seed: int | None = None,
    ) -> None:  # fmt: skip
        self._source, self._collate = source, collate
        self._global_batch, self._num_shards = global_batch, num_shards
        self._shuffle_seed = shuffle_seed
        self._reader = self._fresh_reader()
        self._known: dict[int, Position] = {}
        self._seating = RankPlace(rank=0, size=1, committed=0)
        self._stand_in: list[Any] = []

    def _fresh_reader(self) -> StreamReader:
        return StreamReader(
            self._source,
            num_shards=self._num_shards,
            global_batch=self._global_batch,
            shuffle_seed=self._shuffle_seed,
        )

    def seat(self, seating: RankPlace) -> None:
        self._seating = seating
        shards = shards_of_rank(seating.rank, seating.size, self._num_shards)
        if seating.units is not None:  # a unit has samples of several shards
            shards = tuple(range(self._num_shards))
        self._reader.own(shards, committed=seating.committed, known=self._known)

    def share(self, step: int) -> StepShare:
        seating = self._seating
        if seating.units is not None:
            ids_B = step_sample_numbers(step, self._global_batch)
            return dealt_share(ids_B, seating.units, rank=seating.rank, size=seating.size)
        numbers = [
            rank_sample_numbers(
                step,
                self._global_batch,
                num_shards=self._num_shards,
                rank=rank,
                num_ranks=self._seating.size,
            )
            for rank in range(self._seating.size)
        ]
        return StepShare(
            ids_B=step_sample_numbers(step, self._global_batch),
            sizes=tuple(len(part) for part in numbers),
            mine=numbers[self._seating.rank],
        )

    def load(self, step: int, shared: StepShare, *, first: int, size: int) -> Any:
        if size == 0:
            return self._collate([self._any_item()])
        items = self._reader.read(step)
        if shared.units is None:
            return self._collate(items[first : first + size])
        begin = int(shared.ids_B[0])
        return self._collate([items[int(i) - begin] for i in shared.mine[first : first + size]])

    def _any_item(self) -> Any:
        """An item for stand-in batches, from an iterator of its own; consumes nothing."""
        if not self._stand_in:
            item = next(self._source.shard(0, self._num_shards), None)
            if item is None:
                raise DataError(f"shard 0 of {self._num_shards} has no items")
            self._stand_in.append(item)
        return self._stand_in[0]

    def committed(self, step: int) -> None:
        self._reader.commit(step)

    def known(self) -> str:
        """Positions of this rank's shards after the last committed step, as JSON."""
        return json.dumps(encoded_positions(self._reader.positions()))

    def learn(self, texts: Sequence[str]) -> None:
        """Take the positions of all shards from every rank's ``known``."""
        for text in texts:
            self._known |= decoded_positions(json.loads(text))

    def state(self) -> dict[str, Any]:
        known = self._known | self._reader.positions()
        return {
            "num_samples": -1,
            "num_shards": self._num_shards,
            "shards": encoded_positions(known),
        }

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Read on from the positions in ``state``; open shards are closed.

        Raises:
            DataError: The run's stream is cut into another number of shards.
        """
        theirs = int(state.get("num_shards", 0))
        if theirs != self._num_shards:
            raise DataError(
                f"data.num_shards={self._num_shards}, but the run reads {theirs or 'no'} shards; "
                f"it is fixed once a run has begun"
            )
        self._reader = self._fresh_reader()
        self._known = decoded_positions(state["shards"])

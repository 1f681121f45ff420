"""Bookkeeping of streams that are read exactly once while ranks join and leave.

A stream has a fixed number of shards. Sample n of the run (from 0) is item ``n // num_shards`` of
shard ``n % num_shards``, and step t takes the samples ``(t - 1) * B`` to ``t * B - 1``. So how far
each shard has been read after a committed step is a function of the step alone. Which rank reads a
shard follows from the members; another rank takes over a shard at its committed position.

Shapes: B samples of a step, S shards, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lazarus.data.sampler import permute
from lazarus.errors import DataError

State = Mapping[str, Any]  # JSON values and tensors


@runtime_checkable
class ShardIterator(Protocol):
    """Iterator over one shard that can be resumed.

    ``state_dict`` describes the position; an iterator that loads the state continues from there.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State, /) -> None: ...


@runtime_checkable
class StreamSource(Protocol):
    """The user's stream. ``shard(i, of)`` opens shard ``i`` of ``of`` shards at its beginning."""

    def shard(self, i: int, of: int, /) -> ShardIterator: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a shard has been read: ``consumed`` items; ``state`` was saved after ``state_at``.

    Without a state the shard is read from its beginning (``state_at`` is 0). Items between
    ``state_at`` and ``consumed`` are read and thrown away.
    """

    consumed: int
    state_at: int = 0
    passes: int = 0  # how often the shard had been read to its end when the state was saved
    state: State | None = None


def step_sample_numbers(step: int, global_batch: int) -> NDArray[np.int64]:
    """Numbers of a step's samples, int64 [B]; they serve as the samples' ids."""
    if step < 1 or global_batch < 1:
        raise ValueError(f"step={step}, global_batch={global_batch}: each must be >= 1")
    return np.arange((step - 1) * global_batch, step * global_batch, dtype=np.int64)


def consumed_after(step: int, global_batch: int, num_shards: int) -> NDArray[np.int64]:
    """Items that all steps up to and including ``step`` take from each shard, int64 [S].

    ``step`` may be 0.
    """
    whole, extra = divmod(step * global_batch, num_shards)
    consumed_S = np.full(num_shards, whole, dtype=np.int64)
    consumed_S[:extra] += 1
    return consumed_S


def shards_of_rank(rank: int, num_ranks: int, num_shards: int) -> tuple[int, ...]:
    """The shards that a rank reads: every R-th, so that a step's samples are spread evenly.

    A step's shards are consecutive; the ranks' samples of a step differ by at most two.
    """
    return tuple(range(rank, num_shards, num_ranks))


def rank_sample_numbers(
    step: int, global_batch: int, *, num_shards: int, rank: int, num_ranks: int
) -> NDArray[np.int64]:
    """Numbers of the samples of a step that one rank reads, ascending; may be empty."""
    numbers = step_sample_numbers(step, global_batch)
    mine: NDArray[np.int64] = numbers[(numbers % num_shards) % num_ranks == rank]
    return mine


@dataclass(kw_only=True)
class _Open:
    """One open shard, with the items that no committed step has taken yet."""

    iterator: ShardIterator
    next_item: int  # number of the item that the iterator gives next
    passes: int
    kept: dict[int, Any] = field(default_factory=dict)
    saved: dict[int, tuple[int, State]] = field(default_factory=dict)  # item -> passes, state


class StreamReader:
    """Reads one rank's shards. Runs in a worker; not safe for use by several threads at once.

    Call ``own`` after each change of the members, ``read`` for a step (again for a redo, ahead for
    prefetching), ``commit`` when the step commits, and ``positions`` to hand over or to save.

    Args:
        source: The user's stream.
        num_shards: Shards into which the stream is cut.
        global_batch: Samples of a step.
        shuffle_seed: Seed of the order of shards; None keeps their order.
    """

    def __init__(
        self,
        source: StreamSource,
        *,
        num_shards: int,
        global_batch: int,
        shuffle_seed: int | None = None,
    ) -> None:
        self._source, self._num_shards, self._global_batch = source, num_shards, global_batch
        order = np.arange(num_shards, dtype=np.uint64)
        if shuffle_seed is not None:
            order = permute(order, seed=shuffle_seed, epoch=0, size=num_shards)
        self._order = [int(i) for i in order]
        self._open: dict[int, _Open] = {}
        self._committed = 0

    def own(
        self, shards: Iterable[int], *, committed: int, known: Mapping[int, Position] | None = None
    ) -> None:
        """Read these shards from now on; the step after ``committed`` comes next.

        Shards that are open already continue, and what was read ahead is kept. Other shards are
        opened at their position in ``known``, or at their beginning, and read on to where the
        committed step ends.

        Args:
            shards: The shards that this rank reads.
            committed: The last committed step.
            known: Positions of shards, as ``positions`` returned them on any rank.

        Raises:
            DataError: A known position lies after the committed step, or a shard is empty.
        """
        wanted = set(shards)
        self._committed = committed
        for gone in set(self._open) - wanted:
            del self._open[gone]
        consumed = consumed_after(committed, self._global_batch, self._num_shards)
        for shard in sorted(wanted - set(self._open)):
            place = int(consumed[shard])
            position = (known or {}).get(shard) or Position(consumed=0)
            self._open[shard] = self._reopen(shard, position, place=place)

    def read(self, step: int) -> list[Any]:
        """This rank's samples of a step, in the order of their numbers.

        The step may be read again until it is committed, and gives the same objects.

        Raises:
            DataError: The step is committed already, or a shard has no items.
        """
        if step <= self._committed:
            raise DataError(f"step {step} is read, but step {self._committed} is committed")
        samples = []
        for number in step_sample_numbers(step, self._global_batch).tolist():
            item, shard = divmod(number, self._num_shards)
            if shard in self._open:
                samples.append(self._item(shard, item))
        return samples

    def commit(self, step: int) -> None:
        """Forget the samples of ``step`` and earlier steps."""
        self._committed = step
        consumed = consumed_after(step, self._global_batch, self._num_shards)
        for shard, opened in self._open.items():
            place = int(consumed[shard])
            for item in [i for i in opened.kept if i < place]:
                del opened.kept[item]
            for item in [i for i in opened.saved if i < place][:-1]:
                del opened.saved[item]

    def positions(self) -> dict[int, Position]:
        """Positions of this rank's shards after the last committed step."""
        consumed = consumed_after(self._committed, self._global_batch, self._num_shards)
        return {s: self._position(o, int(consumed[s])) for s, o in sorted(self._open.items())}

    def _position(self, opened: _Open, place: int) -> Position:
        usable = [item for item in opened.saved if item <= place]
        if not usable:
            return Position(consumed=place)
        passes, state = opened.saved[max(usable)]
        return Position(consumed=place, state_at=max(usable), passes=passes, state=state)

    def _reopen(self, shard: int, position: Position, *, place: int) -> _Open:
        if position.state_at > place:
            raise DataError(
                f"shard {shard} is known at item {position.state_at}, but the committed step "
                f"ends at item {place}"
            )
        opened = _Open(
            iterator=self._begin(shard), next_item=position.state_at, passes=position.passes
        )
        if position.state is not None:
            opened.iterator.load_state_dict(position.state)
        while opened.next_item < place:
            self._advance(shard, opened)
        self._save(opened)
        return opened

    def _item(self, shard: int, item: int) -> Any:
        opened = self._open[shard]
        while opened.next_item <= item:
            number = opened.next_item
            opened.kept[number] = self._advance(shard, opened)
            self._save(opened)
        return opened.kept[item]

    def _advance(self, shard: int, opened: _Open) -> Any:
        """Read the next item; a shard that is exhausted begins again."""
        for _ in range(2):
            try:
                sample = next(opened.iterator)
            except StopIteration:
                opened.iterator, opened.passes = self._begin(shard), opened.passes + 1
                continue
            opened.next_item += 1
            return sample
        raise DataError(f"shard {shard} of {self._num_shards} has no items")

    def _begin(self, shard: int) -> ShardIterator:
        return self._source.shard(self._order[shard], self._num_shards)

    def _save(self, opened: _Open) -> None:
        opened.saved[opened.next_item] = (opened.passes, opened.iterator.state_dict())


class IterableDatasetSource:
    """Reads a Hugging Face ``datasets.IterableDataset`` as a stream.

    Raises:
        DataError: The dataset has a shuffle buffer, whose content is not part of its state.
    """

    def __init__(self, dataset: Any) -> None:
        layer = getattr(dataset, "_ex_iterable", None)
        while layer is not None:
            if "BufferShuffled" in type(layer).__name__:
                raise DataError(
                    "the dataset has a shuffle buffer, and what is in it is lost with its reader; "
                    "leave out .shuffle() and set data.shuffle_shards = true"
                )
            layer = getattr(layer, "ex_iterable", None)
        self._dataset = dataset

    def shard(self, i: int, of: int, /) -> ShardIterator:
        """Open shard ``i`` of ``of``; the dataset needs at least that many shards."""
        have = int(getattr(self._dataset, "num_shards", of))
        if have < of:
            raise DataError(
                f"the dataset has {have} shards, data.num_shards={of} needs as many; set "
                f"data.num_shards={have}, or cut the dataset into more"
            )
        return _DatasetShard(self._dataset.shard(num_shards=of, index=i))


class _DatasetShard:
    """Iterator over one shard of a dataset; a state is loaded before iteration begins."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._dataset)
        return next(self._iterator)

    def state_dict(self) -> State:
        state: State = self._dataset.state_dict()
        return state

    def load_state_dict(self, state: State, /) -> None:
        self._dataset.load_state_dict(dict(state))
        self._iterator = None

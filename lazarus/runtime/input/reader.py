"""Reads a step's samples from one source, ahead of time where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import IterableDataset

from dispatcher.exchange import Exchange
from lazarus.data.corpus import TokenDataset
from lazarus.data.packing import Packed, Padded
from lazarus.data.stream import IterableDatasetSource, StreamSource
from lazarus.errors import DataError
from lazarus.runtime.comm.gathering import gather_texts
from lazarus.runtime.input.randomness import fingerprint, reseed
from lazarus.runtime.input.sources import (
    Collate,
    IndexedSource,
    RankPlace,
    ShardedSource,
    Source,
    StepShare,
)

POSITIONS_EVERY = 16  # steps between exchanges of shard positions
RoundsOf = Callable[[StepShare], Sequence[int]]  # sizes of this rank's micro-batches


class Reading:
    """One rank's source of samples, with a thread that reads ahead.

    Reading ahead consumes nothing: positions move only at commits. If loading a batch draws random
    numbers, no batch is read ahead: each is loaded while the training thread waits, after reseeding
    for the micro-batch (rule 5 of docs/protocol.md).

    Args:
        source: Where samples come from.
        seed: The run's seed.
        prefetch_steps: Steps to read ahead; 0 reads in the training thread.
        never_draws: The source is known not to draw random numbers.
    """

    def __init__(
        self, source: Source, *, seed: int, prefetch_steps: int, never_draws: bool = False
    ) -> None:
        self._source, self._seed, self._prefetch_steps = source, seed, prefetch_steps
        self._thread: ThreadPoolExecutor | None = None
        if prefetch_steps:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: dict[tuple[int, int, int], Future[Any]] = {}
        self._shares: dict[int, StepShare] = {}
        self._never_draws = never_draws
        self._draws: bool | None = None  # whether loading draws random numbers; None: unknown yet
        self._bookkeeping: Future[None] | None = None  # the source's bookkeeping of the last commit
        self.num_samples = source.num_samples

    def seat(self, seating: RankPlace) -> None:
        """Take this rank's place in a new generation, and discard what was read ahead."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self._shares.clear()
        self._draws = None
        self._run(lambda: self._source.seat(seating))

    def share(self, step: int) -> StepShare:
        """The samples of a step, and how many of them each rank has."""
        if step not in self._shares:
            self._shares[step] = self._source.share(step)
        return self._shares[step]

    def batch(self, step: int, *, first: int, size: int) -> Any:
        """Load one micro-batch of this rank; see ``Source.load``."""
        future = self._ahead.pop((step, first, size), None)
        if future is not None:
            return future.result()
        return self._run(lambda: self._load_now(step, first, size))

    def read_ahead(self, step: int, rounds_of: RoundsOf) -> None:
        """Begin to load the steps after ``step``; returns at once.

        Args:
            step: The current step.
            rounds_of: Gives the sizes of this rank's micro-batches.
        """
        if self._thread is None or self._draws is not False:
            return
        for later in range(step + 1, step + 1 + self._prefetch_steps):
            if not any(key[0] == later for key in self._ahead):
                self._begin(self._thread, later, rounds_of)

    def _begin(self, thread: ThreadPoolExecutor, step: int, rounds_of: RoundsOf) -> None:
        shared, first = self.share(step), 0
        for size in rounds_of(shared):
            self._ahead[(step, first, size)] = thread.submit(
                self._source.load, step, shared, first=first, size=size
            )
            first += size

    def _load_now(self, step: int, first: int, size: int) -> Any:
        shared = self.share(step)
        if self._never_draws:
            self._draws = False
            return self._source.load(step, shared, first=first, size=size)
        reseed(self._seed, step, int(shared.mine[first] if size else shared.ids_B[0]))
        if self._thread is None or self._draws:
            return self._source.load(step, shared, first=first, size=size)
        before = fingerprint()
        batch = self._source.load(step, shared, first=first, size=size)
        self._draws = fingerprint() != before
        return batch

    def committed(self, step: int) -> None:
        """Move positions on to the committed ``step``; the source does so in the background."""
        self._ahead = {key: value for key, value in self._ahead.items() if key[0] > step}
        self._shares = {key: value for key, value in self._shares.items() if key > step}
        if self._thread is None:
            self._source.committed(step)
            return
        if self._bookkeeping is not None:
            self._bookkeeping.result()  # one step old: raises if that failed
        self._bookkeeping = self._thread.submit(self._source.committed, step)

    def exchange_state(self, step: int, exchange: Exchange, *, device: torch.device) -> None:
        """Let all ranks of a stream exchange shard positions, every ``POSITIONS_EVERY`` steps."""
        if self.num_samples >= 0 or step % POSITIONS_EVERY:
            return
        texts = gather_texts(self._run(self._source.known), exchange, device=device)
        self._run(lambda: self._source.learn(texts))

    def state(self) -> dict[str, Any]:
        """JSON values from which another rank, or a resumed run, can read on."""
        found: dict[str, Any] = self._run(self._source.state)
        return found

    def take_state(self, state: dict[str, Any]) -> None:
        """Read on from what ``state`` returned elsewhere.

        Raises:
            DataError: The state belongs to other data.
        """
        self._run(lambda: self._source.take_state(state))

    def _run(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the reading thread if there is one: only that thread uses the source."""
        return work() if self._thread is None else self._thread.submit(work).result()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def open_reading(
    data: Any,
    *,
    collate: Collate,
    seed: int,
    global_batch: int,
    num_shards: int = 64,
    shuffle_shards: bool = False,
    prefetch_steps: int = 0,
) -> Reading:
    """Open training data of any of the three kinds.

    Args:
        data: Map-style data, an object with ``batch(step, sample_ids)``, or a stream of shards.
        collate: Makes a batch of a list of samples.
        seed: The run's seed.
        global_batch: Samples of a step.
        num_shards: Shards into which a stream is cut.
        shuffle_shards: Read the shards of a stream in an order drawn from ``seed``.
        prefetch_steps: Steps to read ahead.

    Raises:
        DataError: The data is of no known kind, is empty, or keeps a shuffle buffer.
    """
    if hasattr(data, "_ex_iterable"):
        data = IterableDatasetSource(data)
    source: Source
    if _is_indexed(data):
        source = IndexedSource(
            data,
            collate=collate,
            seed=seed,
            global_batch=global_batch,
            num_samples=_size_of(data),
        )
    elif isinstance(data, StreamSource) and not isinstance(data, IterableDataset):
        source = ShardedSource(
            data,
            collate=collate,
            global_batch=global_batch,
            num_shards=num_shards,
            shuffle_seed=seed if shuffle_shards else None,
        )
    else:
        raise DataError(
            f"{type(data).__name__} is no data source: give it __len__ and __getitem__, or "
            f"batch(step, sample_ids), or shard(i, of) whose iterators have state_dict() and "
            f"load_state_dict()"
        )
    never_draws = isinstance(data, TokenDataset | Packed | Padded)
    return Reading(source, seed=seed, prefetch_steps=prefetch_steps, never_draws=never_draws)


def _is_indexed(data: Any) -> bool:
    """Whether samples are addressed by id: map-style, or through ``batch(step, sample_ids)``."""
    if isinstance(data, IterableDataset):
        return False
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return by_index or (not hasattr(data, "__getitem__") and callable(getattr(data, "batch", None)))


def _size_of(data: Any) -> int:
    """Number of samples; 0 for data without a length."""
    if not hasattr(data, "__len__"):
        return 0
    if not len(data):
        raise DataError("the data source is empty; it must have at least one sample")
    return len(data)

"""An exchange between threads of one process, for tests and notebooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dispatcher.errors import ExchangeClosedError, RanksPartedError
from dispatcher.exchange import Done, Exchange, Pending

T = TypeVar("T")


class LoopbackWorld:
    """``size`` ranks, each in a thread of its own, that meet at a barrier for every collective."""

    def __init__(self, size: int, *, timeout_s: float = 60.0) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._barrier = threading.Barrier(size)
        self._posts: list[tuple[str, Tensor, tuple[int, ...]] | None] = [None] * size
        self._parted: list[str] = []  # labels by rank where ranks met in different collectives

    def exchange(self, rank: int) -> LoopbackExchange:
        """Return the exchange of ``rank``."""
        return LoopbackExchange(self, rank)

    def close(self) -> None:
        """Wake up all waiting ranks; their collectives raise ``ExchangeClosedError``."""
        self._barrier.abort()

    def meet(
        self,
        rank: int,
        post: tuple[str, Tensor, tuple[int, ...]],
        take: Callable[[list[tuple[str, Tensor, tuple[int, ...]]]], None],
    ) -> None:
        """Run one collective: post, wait for all ranks, read their posts, wait until all have read.

        Raises:
            RanksPartedError: The ranks' labels differ.
            ExchangeClosedError: A rank failed or timed out.
        """
        self._posts[rank] = post
        self._wait()
        posts = [entry for entry in self._posts if entry is not None]
        labels = [label for label, _, _ in posts]
        if len(set(labels)) > 1:
            self._parted = labels
            raise RanksPartedError(labels)
        take(posts)
        self._wait()

    def _wait(self) -> None:
        try:
            self._barrier.wait(self._timeout_s)
        except threading.BrokenBarrierError as error:
            if self._parted:
                raise RanksPartedError(self._parted) from error
            raise ExchangeClosedError("a peer of this loopback exchange is gone") from error


class LoopbackExchange:
    """The exchange of one rank of a ``LoopbackWorld``. Sums run in ascending rank order."""

    def __init__(self, world: LoopbackWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        def take(posts: list[tuple[str, Tensor, tuple[int, ...]]]) -> None:
            parts = []
            for source, (_, rows, splits) in enumerate(posts):
                part = torch.split(rows, list(splits))[self.rank]
                if part.shape[0] != output_splits[source]:
                    raise ExchangeClosedError(
                        f"rank {self.rank} expects {output_splits[source]} rows from rank "
                        f"{source}, which sends {part.shape[0]} ({label})"
                    )
                parts.append(part)
            output.copy_(torch.cat(parts))

        self._world.meet(self.rank, (label, input, tuple(input_splits)), take)

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        mine = tensor.clone()

        def take(posts: list[tuple[str, Tensor, tuple[int, ...]]]) -> None:
            total = posts[0][1].clone()
            for _, part, _ in posts[1:]:
                total += part
            tensor.copy_(total)

        self._world.meet(self.rank, (label, mine, ()), take)

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        self.all_reduce(tensor, label=label)
        return Done()

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        def take(posts: list[tuple[str, Tensor, tuple[int, ...]]]) -> None:
            output.copy_(torch.cat([part.reshape(-1) for _, part, _ in posts]).view_as(output))

        self._world.meet(self.rank, (label, input, ()), take)


def run_ranks(body: Callable[[Exchange], T], *, size: int, timeout_s: float = 60.0) -> list[T]:
    """Run ``body`` once per rank, each in a thread of its own, and return the results by rank.

    Raises:
        BaseException: The error of the lowest rank that failed by itself. All other ranks are
            woken up.
    """
    world = LoopbackWorld(size, timeout_s=timeout_s)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            results[rank] = body(world.exchange(rank))
        except BaseException as error:  # noqa: BLE001 - a thread's edge: kept and raised below
            errors[rank] = error
            world.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        own = [e for _, e in sorted(errors.items()) if not isinstance(e, ExchangeClosedError)]
        raise (own or [errors[min(errors)]])[0]
    return [results[rank] for rank in range(size)]

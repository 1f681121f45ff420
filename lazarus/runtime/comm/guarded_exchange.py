"""The exchange that a run computes through: fenced, observed, and a place for injected faults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dispatcher.errors import RanksPartedError
from dispatcher.exchange import Exchange, Pending
from lazarus.errors import CollectiveError, FencedError
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.trail import Trail

# Which phase of the step a collective belongs to; faults strike there.
PHASE_OF_LABEL = {
    "dispatch": "dispatch",
    "combine": "combine",
    "replica_grad": "grad_sync",
    "dense_grad": "grad_sync",
    "meeting": "grad_sync",
    "commit": "commit",
    "transfer": "transfer",
}


class Observer(Protocol):
    """Told of every phase that the training thread passes, and of the trail it leaves."""

    trail: Trail | None

    def enter(self, phase: str) -> None: ...
    def waiting(self, label: str) -> None: ...
    def done(self) -> None: ...


class GuardedExchange:
    """Every collective of the training thread goes through here.

    Before each: the fence is checked. A failed collective becomes FencedError if the fence was the
    cause, else CollectiveError, which the worker reports as a suspicion; ranks that met in
    different collectives are told so by a RanksPartedError.

    Args:
        inner: What moves the data.
        ledger: Knows the fence.
        observer: Is told of phases and waits.
        group: Name of the group within its generation.
        mute_peers: Tells to which ranks a link carries nothing.
    """

    def __init__(
        self,
        inner: Exchange,
        *,
        ledger: StepLedger,
        observer: Observer,
        group: str = "train",
        mute_peers: Callable[[], tuple[int, ...]] = tuple,
    ) -> None:
        self._inner = inner
        self._ledger = ledger
        self._observer = observer
        self._generation = ledger.fence
        self._layer = -1
        self.trail = Trail(
            generation=ledger.fence, group=group, rank=inner.rank, mute_peers=mute_peers
        )
        self.rank = inner.rank
        self.size = inner.size

    def in_layer(self, layer: int) -> GuardedExchange:
        """The same exchange, for the collectives of one MoE layer."""
        found = copy.copy(self)
        found._layer = layer
        return found

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        def collective(whole: str) -> None:
            self._inner.all_to_all(
                output, input, output_splits=output_splits, input_splits=input_splits, label=whole
            )

        self._run(label, collective)

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        self._run(label, lambda whole: self._inner.all_reduce(tensor, label=whole))

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        self._run(label, lambda whole: self._inner.all_gather(output, input, label=whole))

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        pending: list[Pending] = []
        self._run(
            label, lambda whole: pending.append(self._inner.start_all_reduce(tensor, label=whole))
        )
        return _GuardedPending(self, pending[0], label)

    def _run(self, label: str, collective: Callable[[str], None]) -> None:
        observer = self._observer
        phase = PHASE_OF_LABEL.get(label)
        if phase is not None:
            observer.enter(phase)
        observer.trail = self.trail
        whole = self.trail.note(label, layer=self._layer)
        self._wait(label, lambda: collective(whole))

    def _wait(self, label: str, collective: Callable[[], None]) -> None:
        if self._ledger.fence != self._generation:
            raise FencedError(generation=self._generation, fence=self._ledger.fence)
        self._observer.waiting(label)
        try:
            collective()
        except (RuntimeError, RanksPartedError) as problem:
            if self._ledger.fence != self._generation:
                raise FencedError(
                    generation=self._generation, fence=self._ledger.fence
                ) from problem
            if isinstance(problem, RanksPartedError):
                raise
            reason = str(problem).splitlines()[0]
            raise CollectiveError(
                label=label, generation=self._generation, reason=reason
            ) from problem
        finally:
            self._observer.done()


class _GuardedPending:
    def __init__(self, guard: GuardedExchange, inner: Pending, label: str) -> None:
        self._guard, self._inner, self._label = guard, inner, label

    def wait(self) -> None:
        self._guard._wait(self._label, self._inner.wait)


def trail_of(exchange: Exchange) -> Trail | None:
    """What an exchange notes of its collectives; None where it notes nothing."""
    return exchange.trail if isinstance(exchange, GuardedExchange) else None


def in_layer(exchange: Exchange, layer: int) -> Exchange:
    """The exchange as one layer uses it, where exchanges tell layers apart."""
    return exchange.in_layer(layer) if isinstance(exchange, GuardedExchange) else exchange

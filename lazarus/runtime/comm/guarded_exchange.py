"""The collectives of the training thread, with a fence check, an observer and fault injection."""

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

# Label of a collective -> phase of the step, at whose start faults can be injected.
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
    """Follows the training thread: its phase, what it waits for, and the trail of collectives."""

    trail: Trail | None

    def enter(self, phase: str) -> None: ...
    def waiting(self, label: str) -> None: ...
    def done(self) -> None: ...


class GuardedExchange:
    """An exchange that checks the fence before each collective and reports to an observer.

    Args:
        inner: The exchange that moves the data.
        ledger: Holds the fence.
        observer: Notified of phases and waits.
        group: Name of the group within its generation.
        mute_peers: Returns the ranks whose machine does not acknowledge data sent to it.

    Raises:
        FencedError: By any collective, if the generation is over.
        CollectiveError: By a collective that failed for another reason; the worker reports this as
            a suspicion.
        RanksPartedError: By a collective in which ranks called different collectives.
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
        """A copy of this exchange whose trail names ``layer``, the index of an MoE layer."""
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
    """The trail of an exchange; None if the exchange is not guarded and keeps none."""
    return exchange.trail if isinstance(exchange, GuardedExchange) else None


def in_layer(exchange: Exchange, layer: int) -> Exchange:
    """The exchange for one MoE layer; an exchange that is not guarded is returned as is."""
    return exchange.in_layer(layer) if isinstance(exchange, GuardedExchange) else exchange

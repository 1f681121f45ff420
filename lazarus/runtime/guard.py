"""The exchange that a run computes through: fenced, observed, and a place for injected faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dispatcher.exchange import Exchange, Pending
from lazarus.errors import CollectiveError, FencedError
from lazarus.runtime.ledger import StepLedger

# Which phase of the step a collective belongs to; faults strike there.
PHASE_OF_LABEL = {
    "dispatch": "dispatch",
    "combine": "combine",
    "replica_grad": "grad_sync",
    "dense_grad": "grad_sync",
    "commit": "commit",
    "transfer": "transfer",
}


class Observer(Protocol):
    """Told of every phase that the training thread passes."""

    def enter(self, phase: str) -> None: ...
    def waiting(self, label: str) -> None: ...
    def done(self) -> None: ...


class GuardedExchange:
    """Every collective of the training thread goes through here.

    Before each: the fence is checked. A failed collective becomes FencedError if the fence was the
    cause, else CollectiveError, which the worker reports as a suspicion.
    """

    def __init__(self, inner: Exchange, *, ledger: StepLedger, observer: Observer) -> None:
        self._inner = inner
        self._ledger = ledger
        self._observer = observer
        self._generation = ledger.fence
        self.rank = inner.rank
        self.size = inner.size

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        self._run(
            label,
            lambda: self._inner.all_to_all(
                output, input, output_splits=output_splits, input_splits=input_splits, label=label
            ),
        )

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        self._run(label, lambda: self._inner.all_reduce(tensor, label=label))

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        self._run(label, lambda: self._inner.all_gather(output, input, label=label))

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        pending: list[Pending] = []
        self._run(label, lambda: pending.append(self._inner.start_all_reduce(tensor, label=label)))
        return _GuardedPending(self, pending[0], label)

    def _run(self, label: str, collective: Callable[[], None]) -> None:
        phase = PHASE_OF_LABEL.get(label)
        if phase is not None:
            self._observer.enter(phase)
        self._wait(label, collective)

    def _wait(self, label: str, collective: Callable[[], None]) -> None:
        if self._ledger.fence != self._generation:
            raise FencedError(generation=self._generation, fence=self._ledger.fence)
        self._observer.waiting(label)
        try:
            collective()
        except RuntimeError as problem:
            if self._ledger.fence != self._generation:
                raise FencedError(
                    generation=self._generation, fence=self._ledger.fence
                ) from problem
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

"""Builds, releases and closes a rank's process groups (rules 18 and 24 of docs/protocol.md)."""

from __future__ import annotations

import threading

import torch

from lazarus.control.messages import Prepare, Seat
from lazarus.errors import CollectiveError, FencedError
from lazarus.runtime.comm.groups import Group, StoreUnreachableError
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.spec import WorkerSpec

STORE = "rendezvous store"  # label of the CollectiveError when the store does not answer


class RankGroups:
    """The process groups of the current generation. Only ``release`` is thread-safe."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        ledger: StepLedger,
        observer: Observer,
        device: torch.device,
    ) -> None:
        self._spec, self._config, self._device = spec, spec.config, device
        self._ledger, self._observer = ledger, observer
        self._lock = threading.Lock()
        self._groups: list[Group] = []

    def release(self) -> None:
        """Abort all groups, so that the training thread stops waiting in a collective."""
        with self._lock:
            groups = list(self._groups)
        for group in groups:
            group.release()

    def close(self) -> None:
        """Release all groups and free their sockets and threads."""
        with self._lock:
            groups, self._groups = self._groups, []
        for group in groups:
            group.close()

    def build(self, seats: tuple[Seat, ...], order: Prepare, kind: str) -> GuardedExchange:
        """Build a process group.

        Args:
            seats: The group's members in rank order; this worker is one of them.
            order: The controller's order, with the generation and the store's address.
            kind: Name of the group within the generation.

        Raises:
            FencedError: The generation is over.
            CollectiveError: The store did not answer (label ``STORE``), or a peer did not come.
        """
        group = Group(generation=order.generation)
        with self._lock:
            self._groups.append(group)
        if self._ledger.fence != order.generation:
            raise FencedError(generation=order.generation, fence=self._ledger.fence)
        rank = next(i for i, s in enumerate(seats) if s.worker == self._spec.worker)
        timeouts = self._config.timeouts
        self._observer.waiting("groups")
        try:
            group.build(
                store=order.store,
                prefix=f"{self._spec.run_id}/{order.generation}/{kind}",
                rank=rank,
                size=len(seats),
                host=self._spec.host,
                device=self._device,
                timeout_s=timeouts.collective_s,
                connect_s=timeouts.group_build_s,
            )
            exchange = group.exchange(
                shared=self._device.type == "cpu" and self._config.dispatch.transport == "auto",
                timeout_s=timeouts.collective_s,
            )
        except RuntimeError as problem:
            if self._ledger.fence != order.generation:
                raise FencedError(
                    generation=order.generation, fence=self._ledger.fence
                ) from problem
            is_store = isinstance(problem, StoreUnreachableError)
            raise CollectiveError(
                label=STORE if is_store else "groups",
                generation=order.generation,
                reason=str(problem).splitlines()[0],
            ) from problem
        finally:
            self._observer.done()
        return GuardedExchange(
            exchange,
            ledger=self._ledger,
            observer=self._observer,
            group=kind,
            mute_peers=group.mute_peers,
        )

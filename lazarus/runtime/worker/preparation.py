"""PREPARE on one rank: groups, transfers into staging, comparison, and READY.

Rules 23 and 24 of docs/protocol.md are kept here, and R2 of that page: a rank that was outvoted
receives dense state beside its own. No expert slot is touched before RESUME (``generation.py``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lazarus.checkpoint.files.store import Tag
from lazarus.control.messages import Prepare, Ready, Seat, SnapshotHeld
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.healing.restore import Fetcher, still_wanted
from lazarus.runtime.healing.transfer import TransferRun
from lazarus.runtime.saving.place_probe import PlaceProbe
from lazarus.runtime.saving.rollback_state import Base
from lazarus.runtime.state.compare import require_equal
from lazarus.runtime.state.flat_bytes import DenseImage
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.worker.common_state import ref_of
from lazarus.runtime.worker.parts import Parts
from placement import Plan


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A prepared generation that waits for RESUME.

    Attributes:
        order: The order that was carried out.
        plan: The generation's plan.
        exchange: The collectives of the training group; None on a rank that leaves.
        feed: The transfers, with the experts that wait for their slots.
        base: Common state to roll back to; None without a rollback.
    """

    order: Prepare
    plan: Plan
    exchange: GuardedExchange | None
    feed: TransferRun
    base: Base | None


class Preparation:
    """Carries out one PREPARE. Made for each order, and dropped when the order is answered.

    Args:
        order: The order.
        parts: This rank's parts.
        context: The newest context for user functions.
        term: Term of the controller that gave the order.
        has_aligned: Whether this rank aligned for the order's generation. Other ranks join: they
            have no state to keep, while an outvoted rank keeps its own until a sound one is whole.
    """

    def __init__(
        self,
        order: Prepare,
        parts: Parts,
        *,
        context: WorkerContext,
        term: int,
        has_aligned: bool,
    ) -> None:
        self._order, self._parts = order, parts
        self._context, self._term, self._has_aligned = context, term, has_aligned
        self._plan = Plan.from_json(order.plan)
        self._is_seated = self._index(order.seats) is not None

    def _index(self, seats: tuple[Seat, ...]) -> int | None:
        """This worker's place among ``seats``; None if it is not there."""
        own = self._parts.spec.worker
        return next((i for i, seat in enumerate(seats) if seat.worker == own), None)

    def run(self) -> tuple[Pending, Ready]:
        """Build groups, transfer state into staging, and compare digests (rules 23 and 24).

        Raises:
            FencedError: The generation is over.
            CollectiveError, TransferError: A peer, the store or a copy of state has failed.
        """
        order, plan, probe = self._order, self._plan, self._probe()
        started = time.monotonic()
        exchange, feeding = self._build_groups()
        built = time.monotonic()
        if probe is not None:
            probe.read(order.seats)
        base = self._read_base()
        feed, versions = self._receive(exchange, feeding)
        self._compare(feeding, base)
        if probe is not None:
            probe.close()
        ready = Ready(
            generation=order.generation,
            plan_digest=plan.digest,
            groups_s=built - started,
            transfer_s=time.monotonic() - built,
            bytes_received=feed.bytes_received,
            restored=versions,
            history=b"" if base is None else base.history.astype("<f8").tobytes(),
            place=None if probe is None else probe.problem,
        )
        return Pending(order=order, plan=plan, exchange=exchange, feed=feed, base=base), ready

    def _probe(self) -> PlaceProbe | None:
        """Test the checkpoint place, if that is asked for; one rank of each node does."""
        order, parts = self._order, self._parts
        if not (order.probe and self._is_seated) or parts.spec.local_rank:
            return None
        probe = PlaceProbe(
            parts.spec.checkpoint_url,
            run=parts.spec.run_id,
            node=self._context.node,
            patience_s=parts.config.timeouts.storage_stuck_s,
            waiting=still_wanted(parts.observer, parts.ledger, order.generation),
        )
        probe.write()
        return probe

    def _build_groups(self) -> tuple[GuardedExchange | None, GuardedExchange]:
        """The training group, or None on a rank that leaves, and the group of all that feed."""
        order, build = self._order, self._parts.groups.build
        if not self._is_seated:
            return None, build(order.feeders, order, "feed")
        exchange = build(order.seats, order, "train")
        if len(order.feeders) == len(order.seats):  # nobody leaves
            return exchange, exchange
        return exchange, build(order.feeders, order, "feed")

    def _read_base(self) -> Base | None:
        """The common state that the order has every rank roll back to, if any."""
        parts, place = self._parts, self._order.reload
        if not place:
            return None
        return parts.common.read_base(ref_of(place), self._context, read=parts.patient())

    def _receive(
        self, exchange: GuardedExchange | None, feeding: GuardedExchange
    ) -> tuple[TransferRun, tuple[SnapshotHeld, ...]]:
        """Receive what this rank lacks: dense state at once, experts into staging.

        Returns:
            The transfers, and the versions of experts that were read in place of older ones.
        """
        order, parts = self._order, self._parts
        replica, common = parts.replica, parts.common
        is_fed = self._index(order.feeders) in order.dense_targets
        repaired = {}
        if is_fed and self._has_aligned:  # outvoted: receive beside the own state
            repaired = {name: torch.empty_like(t) for name, t in replica.dense_tensors()}
        feed = TransferRun(
            order,
            feeding,
            read_record=replica.read_record,
            dense=DenseImage(list(repaired.values())) if repaired else replica.dense_image(),
            record_bytes=replica.record_bytes,
            device=parts.device,
        )
        feed.run()
        fetcher = self._fetcher()
        if exchange is not None:
            entering = parts.observer.enter
            fetcher.fetch(self._plan, exchange.rank, feed, entering=lambda: entering("transfer"))
        if repaired:
            common.repair(repaired, order)
        elif is_fed:
            common.join(order)
        common.agree(order.scalars)
        return feed, tuple(fetcher.versions)

    def _fetcher(self) -> Fetcher:
        order, parts = self._order, self._parts
        return Fetcher(
            order,
            parts.replica,
            credentials=parts.spec.credentials,
            tag=Tag(job=parts.spec.run_id, term=self._term, generation=order.generation),
            read=parts.patient(),
            keeper_s=parts.config.timeouts.keeper_fetch_s,
        )

    def _compare(self, feeding: GuardedExchange, base: Base | None) -> None:
        """Compare with all ranks what must be equal on every rank before RESUME (rule 24)."""
        order, parts = self._order, self._parts
        require_equal(
            {
                "run": parts.spec.run_id,
                "generation": str(order.generation),
                "step": str(order.step),
                "plan": self._plan.digest,
                "dense state": (parts.replica if base is None else base).dense_digest(),
                "load history": parts.common.history_digest(base),
            },
            feeding,
            device=parts.device,
        )

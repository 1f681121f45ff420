"""One rank's state between orders: replica, groups, staged copies, and the current step.

Rules named in this module are those of docs/protocol.md.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import cloudpickle
import torch

from dispatcher.splits.split import SplitRule
from lazarus.checkpoint.files.store import Tag
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.config.sections import DispatchConfig
from lazarus.control.messages import (
    Align,
    Aligned,
    Body,
    DigestPart,
    Finalize,
    Finalized,
    Healed,
    Prepare,
    Ready,
    Resume,
    SnapshotHeld,
    Vector,
)
from lazarus.control.vector import Lanes, StepSums, VectorLayout, decode
from lazarus.errors import FencedError
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.comm.rank_groups import RankGroups
from lazarus.runtime.comm.standing import Standing
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.healing.background import Refill
from lazarus.runtime.healing.restore import Fetcher, PatientReader, still_wanted
from lazarus.runtime.healing.transfer import TransferRun
from lazarus.runtime.input.sources import RankPlace
from lazarus.runtime.saving.final_checkpoint import FinalWriter
from lazarus.runtime.saving.place_probe import PlaceProbe
from lazarus.runtime.saving.rollback_state import Base
from lazarus.runtime.saving.saver import Saver
from lazarus.runtime.spec import UserCode, WorkerSpec
from lazarus.runtime.state.checksums import text_checksum
from lazarus.runtime.state.compare import require_equal, tensor_sums
from lazarus.runtime.state.digests import digest_items
from lazarus.runtime.state.flat_bytes import DenseImage
from lazarus.runtime.training import defaults
from lazarus.runtime.training.factory import Workshop, first_context
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import Step
from lazarus.runtime.training.world import World
from lazarus.runtime.worker.common_state import CommonState
from placement import Plan


@dataclass(kw_only=True)
class Pending:
    """A prepared generation that waits for RESUME."""

    order: Prepare
    plan: Plan
    exchange: GuardedExchange | None  # None on a rank that leaves
    feed: TransferRun
    base: Base | None  # common state to roll back to, if any


class Rank:
    """Carries out the controller's orders. Only ``release`` is called by the control thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        node: int,
        ledger: StepLedger,
        observer: Observer,
        send: Callable[[Body], None],
    ) -> None:
        self._spec = spec
        self._config = spec.config
        self._ledger = ledger
        self._observer = observer
        self._pending: Pending | None = None
        self._world: World | None = None
        self._step: Step | None = None
        self.user: UserCode = cloudpickle.loads(spec.user)
        self.device = _device(spec.local_rank)
        self.context = first_context(self._config, node=node, device=self.device)
        self._groups = RankGroups(spec, ledger=ledger, observer=observer, device=self.device)
        self._workshop = Workshop(self._config, self.user, observer=observer)
        self._term = 0
        self._loaded = spec.resume is None
        self._aligned = 0  # newest generation that this rank aligned for
        self._plan: Plan | None = None  # plan of the newest RESUME
        self.saver: Saver | None = None
        self._refill: Refill | None = None
        self._make()
        if spec.keeper and self._config.checkpoint.every:
            self.saver = Saver(
                self._config,
                self.replica,
                keeper=spec.keeper,
                credentials=spec.credentials,
                job=spec.run_id,
                url=spec.checkpoint_url,
                scalars=self.common.scalars,
                send=send,
            )
        self.common.begin(self.saver)

    def _make(self) -> None:
        """Make all parts that follow from the configuration and the user's code."""
        shop, context = self._workshop, self.context
        self.replica = shop.replica(context)
        self.reading = shop.reading(context)
        self.batching = shop.batching
        self._hooks = Hooks(self.user.hooks, where=self._observer.where)
        self._hooks.setup(context, self.replica.model)
        self.replica.require_unchanged()
        self._boundary = shop.boundary(self.replica, self._hooks, context)
        self.common = CommonState(
            self.replica,
            reading=self.reading,
            boundary=self._boundary,
            ledger=self._ledger,
            workshop=shop,
        )

    # ---- orders --------------------------------------------------------------------------------

    def release(self) -> None:
        """Free the training thread from any wait. Called by the control thread."""
        self._groups.release()

    def _close_groups(self) -> None:
        self._world = self._step = self._refill = None
        self._groups.close()

    def redo(self) -> None:
        """Drop the current attempt, and restore scratch state as of the last commit (rule 20)."""
        self._close_groups()
        self.common.stand_still()
        self.replica.restore_scratch()

    def accept(self, lanes: Lanes, order: Align) -> None:
        """Apply a step that other ranks committed, using their vector, bit for bit (rule 20)."""
        step, world = self._step, self._world
        assert step is not None and world is not None
        sums = decode(world.layout, lanes)
        self._ledger.accept(Vector(generation=world.generation, step=order.step, lanes=order.lanes))
        self.apply(sums)
        self._ledger.applied(order.step)
        self._close_groups()

    def aligned(self, generation: int, term: int, *, step: int) -> Aligned:
        """Describe this rank's state, for the controller to compare and to plan with."""
        self._close_groups()
        if self.saver is not None:
            self.saver.aligned(self._ledger.gen)
        self._aligned = generation
        base = None if self._pending is None else self._pending.base
        self._pending = None
        if base is not None and base.step == step != self._ledger.committed:
            self.common.take_base(base)  # RESUME was sent, but did not reach this rank
        self._term = term
        if not self._loaded:
            assert self._spec.resume is not None
            self.common.take_base(self._read_base(self._spec.resume))
            self._loaded = True
        replica = self.replica
        snapshots: tuple[SnapshotHeld, ...] = ()
        if self.saver is not None and self._spec.local_rank == 0:
            snapshots = self.saver.inventory(term=term, generation=generation)
        return Aligned(
            generation=generation,
            step=self._ledger.committed,
            dense_digest=replica.dense_digest(),
            history_digest=self.common.history_digest(),
            history=replica.history.astype("<f8").tobytes(),
            held=replica.held(self._plan),
            settings_digest=f"{text_checksum(replica.settings()):x}",
            scalars=self.common.scalars(),
            snapshots=snapshots,
            tensors=() if self._ledger.gen else tensor_sums(replica),
            place=self._observer.where.places.get("build", ""),
            **replica.shape(),
        )

    def _patient(self) -> PatientReader:
        """A storage reader that gives up when this rank is fenced by a newer generation."""
        waiting = still_wanted(self._observer, self._ledger, self._ledger.fence)
        return PatientReader(patience_s=self._config.timeouts.storage_stuck_s, waiting=waiting)

    def reload(self, place: str) -> None:
        """Take the common state of another step, since no rank holds the present one.

        Args:
            place: A checkpoint as "url step", or "init" for the state of the first step.
        """
        self._pending = None
        self.common.take_base(self._read_base(_ref_of(place)))
        self._loaded = True

    def _read_base(self, ref: CheckpointRef | None) -> Base:
        return self.common.read_base(ref, self.context, read=self._patient())

    def prepare(self, order: Prepare, term: int) -> Ready:
        """Build groups, transfer state into staging, and compare digests (rules 23 and 24)."""
        self._close_groups()
        self._term = term  # a joining rank gets no ALIGN
        self._pending = None
        plan = Plan.from_json(order.plan)
        own = self._spec.worker
        seat = next((i for i, s in enumerate(order.seats) if s.worker == own), None)
        probe = self._place_probe(order) if order.probe and seat is not None else None
        started = time.monotonic()
        exchange = self._groups.build(order.seats, order, "train") if seat is not None else None
        feeding = exchange
        if len(order.feeders) > len(order.seats):
            feeding = self._groups.build(order.feeders, order, "feed")
        assert feeding is not None
        built = time.monotonic()
        if probe is not None:
            probe.read(order.seats)
        base = self._read_base(_ref_of(order.reload)) if order.reload else None
        own_seat = next(i for i, s in enumerate(order.feeders) if s.worker == own)
        is_fed = own_seat in order.dense_targets
        repaired = {}
        if is_fed and self._aligned == order.generation:  # outvoted: receive beside the own state
            repaired = {name: torch.empty_like(t) for name, t in self.replica.dense_tensors()}
        feed = TransferRun(
            order,
            feeding,
            read_record=self.replica.read_record,
            dense=DenseImage(list(repaired.values())) if repaired else self.replica.dense_image(),
            record_bytes=self.replica.record_bytes,
            device=self.device,
        )
        feed.run()
        fetcher = self._fetcher(order)
        if seat is not None:
            fetcher.fetch(plan, seat, feed, entering=lambda: self._observer.enter("transfer"))
        if repaired:
            self.common.repair(repaired, order)
        elif is_fed:
            self.common.join(order)
            self._loaded = True
        self.common.agree(order.scalars)
        self._compare(order, plan, feeding, base)
        if probe is not None:
            probe.close()
        self._pending = Pending(order=order, plan=plan, exchange=exchange, feed=feed, base=base)
        return Ready(
            generation=order.generation,
            plan_digest=plan.digest,
            groups_s=built - started,
            transfer_s=time.monotonic() - built,
            bytes_received=feed.bytes_received,
            restored=tuple(fetcher.versions),
            history=b"" if base is None else base.history.astype("<f8").tobytes(),
            place=None if probe is None else probe.problem,
        )

    def _place_probe(self, order: Prepare) -> PlaceProbe | None:
        """Test the checkpoint place; one rank of each node does."""
        if self._spec.local_rank:
            return None
        probe = PlaceProbe(
            self._spec.checkpoint_url,
            run=self._spec.run_id,
            node=self.context.node,
            patience_s=self._config.timeouts.storage_stuck_s,
            waiting=still_wanted(self._observer, self._ledger, order.generation),
        )
        probe.write()
        return probe

    def _fetcher(self, order: Prepare) -> Fetcher:
        tag = Tag(job=self._spec.run_id, term=self._term, generation=order.generation)
        return Fetcher(
            order,
            self.replica,
            credentials=self._spec.credentials,
            tag=tag,
            read=self._patient(),
            keeper_s=self._config.timeouts.keeper_fetch_s,
        )

    def _compare(
        self, order: Prepare, plan: Plan, exchange: GuardedExchange, base: Base | None
    ) -> None:
        """Compare with all ranks what must be equal on every rank before RESUME (rule 24)."""
        require_equal(
            {
                "run": self._spec.run_id,
                "generation": str(order.generation),
                "step": str(order.step),
                "plan": plan.digest,
                "dense state": (self.replica if base is None else base).dense_digest(),
                "load history": self.common.history_digest(base),
            },
            exchange,
            device=self.device,
        )

    def resume(self, order: Resume) -> None:
        """Put staged experts into their slots and get ready for the next step (rule 25)."""
        pending = self._pending
        if pending is None or pending.order.generation != order.generation:
            raise FencedError(generation=order.generation, fence=self._ledger.fence)
        plan, exchange = pending.plan, pending.exchange
        assert exchange is not None
        self._pending = None
        replica = self.replica
        self.common.stand_still()
        if pending.base is not None:
            self.common.take_base(pending.base)
        self._loaded = True  # a rank may join with a rollback, and then never reads spec.resume
        replica.ensure_slots(plan.expert_of_slot.shape[2])
        if self.saver is not None:
            self.saver.schedule.adapt(order)
        self._refill = Refill(pending.order, pending.plan, pending.feed, replica)
        self._plan = plan
        standing = Standing(
            generation=order.generation,
            term=self._term,
            step=order.step,
            plan=plan,
            exchange=exchange,
            seats=pending.order.seats,
            speeds=pending.order.speeds,
        )
        plan = self._refill.plan
        for restore in pending.order.restores:
            replica.drop(restore.layer, restore.expert)
        for key in pending.feed.staged:  # so that `place` replaces an outvoted copy
            replica.drop(*key)
        for layer in range(len(replica.layers)):
            experts = [int(e) for e in plan.expert_of_slot[layer, exchange.rank] if e >= 0]
            replica.place(layer, experts, pending.feed.staged)
        if self.saver is not None and self._spec.local_rank == 0:
            lineage = [(int(g), int(b)) for g, b in json.loads(order.lineage)]
            self.saver.tell_resumed(
                lineage, order.step, term=standing.term, generation=standing.generation
            )
        self.reading.seat(
            RankPlace(
                rank=standing.rank,
                size=standing.size,
                committed=standing.step,
                speeds=standing.speeds or None,
            )
        )
        self.context = dataclasses.replace(
            self.context,
            rank=standing.rank,
            world_size=standing.size,
            generation=standing.generation,
        )
        self._enter(plan, standing)

    def _enter(self, plan: Plan, standing: Standing) -> None:
        """Compute with the replicas of ``plan`` from the next step on."""
        self._world = World(
            self.replica,
            plan,
            standing,
            rule=split_rule(self._config.dispatch, self.device),
        )
        self._step = Step(
            self.replica,
            self._world,
            batching=self.batching,
            reading=self.reading,
            loss=self.user.loss or defaults.loss,
            observer=self._observer,
            context=self.context,
            hooks=self._hooks,
        )

    def _heal_on(self, refill: Refill, step: int, send: Callable[[Body], None]) -> None:
        """Run one round of background healing between two optimizer steps."""
        world = self._world
        assert world is not None
        rank = world.exchange.rank
        refill.run_round(rank)
        self._enter(refill.plan, world.standing)
        if refill.is_over and rank == 0:
            done = Healed(generation=world.generation, step=step, bytes_received=refill.num_bytes)
            send(done)

    # ---- training ------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """Computes the steps of the current generation."""
        assert self._step is not None
        return self._step

    @property
    def is_reporter(self) -> bool:
        """Whether this is rank 0, which sends vectors; others keep theirs until acknowledged."""
        return self._world is not None and self._world.exchange.rank == 0

    @property
    def may_report(self) -> bool:
        return self._world is None or self.is_reporter

    def compute(self, step: int, *, pause: Callable[[], bool]) -> Lanes:
        """Compute ``step``, twice if a buffer was written that ranks had not agreed to exchange.

        Returns:
            The commit vector, summed over all ranks.
        """
        lanes = self._attempt(step, pause)
        if self.step.must_repeat:  # on all ranks: a written buffer was not exchanged
            self._ledger.withdraw()
            self.replica.restore_scratch()
            lanes = self._attempt(step, pause)
        return lanes

    def _attempt(self, step: int, pause: Callable[[], bool]) -> Lanes:
        return self.step.compute(step, pause=pause, prepared=lambda: self._ledger.prepare(step))

    def apply(self, sums: StepSums) -> None:
        """Apply a committed step: optimizer, measures, data position and save schedule."""
        if self.saver is not None:
            self.saver.before_apply()
        self.replica.apply(sums, dense_square=self.step.dense_square)
        self.context.measures.commit()
        self.reading.committed(sums.step)
        if self.saver is not None:
            self.saver.schedule.committed(sums.step, sums.counts)

    @property
    def told(self) -> tuple[Body, ...]:
        """Messages to repeat to a new controller: last evaluation, and shares of checkpoints."""
        shares = () if self.saver is None else self.saver.told
        evaluation = self._boundary.told
        return shares if evaluation is None else (evaluation, *shares)

    def before_training(self, step: int, send: Callable[[Body], None]) -> None:
        """Report the evaluation after ``step`` if one is due, before training continues."""
        assert self._world is not None
        self._boundary.before_training(step, self._world, send)

    def after_commit(
        self, step: int, send: Callable[[Body], None], *, published: int, saves: bool
    ) -> None:
        """Do what follows a commit: healing, hooks, comparison, snapshot, evaluation, digest.

        Args:
            step: The committed step.
            send: Sends a message to the controller.
            published: The last step that the controller has journaled.
            saves: Whether a snapshot may begin after this step.
        """
        if self._refill is not None and not self._refill.is_over:
            self._heal_on(self._refill, step, send)
        world, boundary = self._world, self._boundary
        assert world is not None
        boundary.check(step, world, send, context=self.context, common=self.common)
        if saves and self.saver is not None:
            self.saver.after_commit(step, world.standing, plan=world.plan, published=published)
        boundary.evaluate(step, world, send)
        every = self._config.run.digest_every
        if every and step % every == 0:
            send(self._digest_part(step))

    def _digest_part(self, step: int) -> DigestPart:
        world = self._world
        assert world is not None
        items = digest_items(
            self.replica, world.plan.home, world.exchange.rank, moved=self._observer.moved
        )
        return DigestPart(generation=world.generation, step=step, items=items)

    def finalize(self, order: Finalize) -> list[Body]:
        """Messages for FINALIZE: the last digest, and this rank's share of the last checkpoint."""
        world = self._world
        assert world is not None
        digest = [] if order.url else [self._digest_part(order.step)]
        if not order.checkpoint:
            return [*digest, Finalized(generation=order.generation, step=order.step)]
        writer = FinalWriter(
            self._spec.checkpoint_url,
            patience_s=self._config.timeouts.storage_patience_s,
            waiting=still_wanted(self._observer, self._ledger, order.generation),
        )
        done = writer.write(
            order,
            self.replica,
            world.plan,
            rank=world.exchange.rank,
            size=world.exchange.size,
            tag=Tag(job=self._spec.run_id, term=order.term, generation=world.generation),
            scalars=self.common.scalars(),
        )
        return [*digest, done]

    def close(self) -> None:
        self.reading.close()
        if self.saver is not None:
            self.saver.close()


def _ref_of(place: str) -> CheckpointRef | None:
    """The checkpoint that an order names; None for "init", the state of the first step."""
    return None if place == "init" else CheckpointRef.parse(place)


def split_rule(asked: DispatchConfig, device: torch.device) -> SplitRule:
    """How token copies are split over replicas.

    The mode "auto" is "home" on CPUs and "balanced" on GPUs, where each rank has its own device.
    """
    on_cpu = device.type == "cpu"
    auto = "home" if on_cpu else "balanced"
    mode = auto if asked.mode == "auto" else asked.mode
    price = asked.rows_per_replica
    if price is None:  # measured on CPUs, modelled for GPUs: see benchmarks/balance_rows.py
        price = 128.0 if on_cpu else 2048.0
    return SplitRule(mode=mode, rows_per_replica=price, ranks_per_device=asked.ranks_per_device)


def _device(local_rank: int) -> torch.device:
    """The rank's device: a GPU chosen by local rank, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        with suppress(RuntimeError):
            torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


__all__ = ["Pending", "Rank", "VectorLayout"]

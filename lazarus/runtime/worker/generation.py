"""One generation on one rank: what exists from RESUME to the next fence, and what it does.

Rules 13 and 25 of docs/protocol.md are kept here: staged experts are switched in at RESUME and no
earlier, and a decided step is applied from its vector without waiting for other ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import torch

from dispatcher.splits.split import SplitRule
from lazarus.checkpoint.files.store import Tag
from lazarus.config.sections import DispatchConfig
from lazarus.control.messages import Body, DigestPart, Finalize, Finalized, Healed, Resume
from lazarus.control.vector import Lanes, StepSums, decode
from lazarus.errors import BrokenInvariantError
from lazarus.runtime.comm.standing import Standing
from lazarus.runtime.healing.background import Refill
from lazarus.runtime.healing.restore import still_wanted
from lazarus.runtime.input.sources import RankPlace
from lazarus.runtime.saving.final_checkpoint import FinalWriter
from lazarus.runtime.state.digests import digest_items
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.step import Step
from lazarus.runtime.training.world import World
from lazarus.runtime.worker.parts import Parts
from lazarus.runtime.worker.preparation import Pending
from placement import Plan


class Generation:
    """Computes, applies, saves and heals in one generation. Made at RESUME, dropped at the fence.

    ``standing`` is this rank's place, ``context`` what user functions get, and ``rule`` says how
    token copies are split over replicas.

    Args:
        parts: This rank's parts.
        standing: This rank's place in the generation.
        refill: The transfers that are left for after RESUME.
        context: The context for user functions in this generation.
    """

    def __init__(
        self, parts: Parts, standing: Standing, *, refill: Refill, context: WorkerContext
    ) -> None:
        self.standing, self.context = standing, context
        self._parts, self._refill = parts, refill
        self.rule = split_rule(
            parts.config.dispatch, parts.device, by_source=parts.workshop.batching.units is not None
        )
        self._world, self._step = self._with_replicas_of(refill.plan)

    def _with_replicas_of(self, plan: Plan) -> tuple[World, Step]:
        """What steps compute in and with, if the replicas of ``plan`` are there."""
        parts = self._parts
        world = World(parts.replica, plan, self.standing, rule=self.rule)
        step = Step(
            parts.replica,
            world,
            batching=parts.workshop.batching,
            reading=parts.reading,
            loss=parts.workshop.loss,
            observer=parts.observer,
            context=self.context,
            hooks=parts.hooks,
        )
        return world, step

    # ---- one step ------------------------------------------------------------------------------

    def compute(self, step: int, *, pause: Callable[[], bool]) -> Lanes:
        """Compute ``step``, twice if a buffer was written that ranks had not agreed to exchange.

        Args:
            step: The step.
            pause: Called last: whether this rank wants all ranks to stop after the step.

        Returns:
            The commit vector, summed over all ranks.
        """
        lanes = self._attempt(step, pause)
        if self._step.must_repeat:  # on all ranks: a written buffer was not exchanged
            self._parts.ledger.withdraw()
            self._parts.replica.restore_scratch()
            lanes = self._attempt(step, pause)
        return lanes

    def _attempt(self, step: int, pause: Callable[[], bool]) -> Lanes:
        ledger = self._parts.ledger
        return self._step.compute(step, pause=pause, prepared=lambda: ledger.prepare(step))

    def check(self, lanes: Lanes, *, step: int) -> StepSums:
        """Decode the vector of the step just computed, and check it (rule 12).

        Raises:
            BrokenInvariantError: The vector is not what the step must have given.
        """
        return self._step.check(lanes, step=step)

    def decode(self, lanes: Lanes) -> StepSums:
        """Decode a vector that other ranks committed."""
        return decode(self._world.layout, lanes)

    def apply(self, sums: StepSums) -> None:
        """Apply a committed step: optimizer, measures, data position and save schedule."""
        parts = self._parts
        if parts.saver is not None:
            parts.saver.before_apply()
        parts.replica.apply(sums, dense_square=self._step.dense_square)
        self.context.measures.commit()
        parts.reading.committed(sums.step)
        if parts.saver is not None:
            parts.saver.schedule.committed(sums.step, sums.counts)

    # ---- between steps -------------------------------------------------------------------------

    def before_training(self) -> None:
        """Report the evaluation after the last committed step if one is due."""
        self._parts.between.before_training(self.standing.step, self._world, self._parts.send)

    def after_commit(self, step: int, *, published: int, saves: bool) -> None:
        """Do what follows a commit: healing, hooks, comparison, snapshot, evaluation, digest.

        Args:
            step: The committed step.
            published: The last step that the controller has journaled.
            saves: Whether a snapshot may begin after this step.
        """
        parts, between, send = self._parts, self._parts.between, self._parts.send
        if not self._refill.is_over:
            self._heal_on(step)
        world = self._world
        between.check(step, world, send, context=self.context, common=parts.common)
        if saves and parts.saver is not None:
            parts.saver.after_commit(step, self.standing, plan=world.plan, published=published)
        between.evaluate(step, world, send)
        every = parts.config.run.digest_every
        if every and step % every == 0:
            send(self._digest_part(step))

    def _heal_on(self, step: int) -> None:
        """Run one round of background healing; later steps compute with what has arrived."""
        refill, standing = self._refill, self.standing
        refill.run_round(standing.rank)
        self._world, self._step = self._with_replicas_of(refill.plan)
        if refill.is_over and standing.is_first:
            self._parts.send(
                Healed(generation=standing.generation, step=step, bytes_received=refill.num_bytes)
            )

    def _digest_part(self, step: int) -> DigestPart:
        parts, standing = self._parts, self.standing
        home, moved = self._world.plan.home, parts.observer.moved
        items = digest_items(parts.replica, home, standing.rank, moved=moved)
        return DigestPart(generation=standing.generation, step=step, items=items)

    def finalize(self, order: Finalize) -> list[Body]:
        """Messages for FINALIZE: the last digest, and this rank's share of the last checkpoint."""
        parts, standing = self._parts, self.standing
        digest = [] if order.url else [self._digest_part(order.step)]
        if not order.checkpoint:
            return [*digest, Finalized(generation=order.generation, step=order.step)]
        writer = FinalWriter(
            parts.spec.checkpoint_url,
            patience_s=parts.config.timeouts.storage_patience_s,
            waiting=still_wanted(parts.observer, parts.ledger, order.generation),
        )
        done = writer.write(
            order,
            parts.replica,
            self._world.plan,
            rank=standing.rank,
            size=standing.size,
            tag=Tag(job=parts.spec.run_id, term=order.term, generation=standing.generation),
            scalars=parts.common.scalars(),
        )
        return [*digest, done]


def begin(
    order: Resume, pending: Pending, parts: Parts, *, term: int, context: WorkerContext
) -> Generation:
    """Put staged experts into their slots and get ready for the next step (rule 25).

    Args:
        order: The order to resume.
        pending: What the PREPARE of the same generation has staged.
        parts: This rank's parts.
        term: Term of the controller that ordered the generation.
        context: The newest context for user functions.
    """
    standing = _standing(order, pending, term=term)
    replica, saver = parts.replica, parts.saver
    parts.common.stand_still()
    if pending.base is not None:
        parts.common.take_base(pending.base)
    replica.ensure_slots(pending.plan.expert_of_slot.shape[2])
    if saver is not None:
        saver.schedule.adapt(order)
    refill = Refill(pending.order, pending.plan, pending.feed, replica)
    _place(pending, refill.plan, parts, rank=standing.rank)
    if saver is not None and parts.spec.local_rank == 0:
        lineage = [(int(g), int(b)) for g, b in json.loads(order.lineage)]
        saver.tell_resumed(lineage, order.step, term=term, generation=order.generation)
    parts.reading.seat(
        RankPlace(
            rank=standing.rank,
            size=standing.size,
            committed=standing.step,
            speeds=standing.speeds or None,
            units=parts.workshop.batching.units,
        )
    )
    context = replace(
        context,
        rank=standing.rank,
        world_size=standing.size,
        generation=standing.generation,
    )
    return Generation(parts, standing, refill=refill, context=context)


def _standing(order: Resume, pending: Pending, *, term: int) -> Standing:
    if pending.exchange is None:
        raise BrokenInvariantError("RESUME has come to a rank that leaves")
    return Standing(
        generation=order.generation,
        term=term,
        step=order.step,
        plan=pending.plan,
        exchange=pending.exchange,
        seats=pending.order.seats,
        speeds=pending.order.speeds,
    )


def _place(pending: Pending, plan: Plan, parts: Parts, *, rank: int) -> None:
    """Give this rank's slots the experts of ``plan``, from staging where they are there."""
    replica, staged = parts.replica, pending.feed.staged
    for restore in pending.order.restores:
        replica.drop(restore.layer, restore.expert)
    for key in staged:  # so that `place` replaces an outvoted copy
        replica.drop(*key)
    for layer in range(len(replica.layers)):
        experts = [int(e) for e in plan.expert_of_slot[layer, rank] if e >= 0]
        replica.place(layer, experts, staged)


def split_rule(
    asked: DispatchConfig, device: torch.device, *, by_source: bool = False
) -> SplitRule:
    """How token copies are split over replicas.

    The mode "auto" is "home" on CPUs and "balanced" on GPUs, where each rank has its own device.
    With ``by_source`` it is "home" everywhere.
    """
    if by_source:
        return SplitRule(mode="home", by_source=True)
    on_cpu = device.type == "cpu"
    auto = "home" if on_cpu else "balanced"
    mode = auto if asked.mode == "auto" else asked.mode
    price = asked.rows_per_replica
    if price is None:  # measured on CPUs, modelled for GPUs: see benchmarks/balance_rows.py
        price = 128.0 if on_cpu else 2048.0
    return SplitRule(mode=mode, rows_per_replica=price, ranks_per_device=asked.ranks_per_device)

"""One step on one rank: rounds of forward and backward, gradient sums, the commit vector.

Rules named in this module are those of docs/protocol.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dispatcher.gradients import sum_replica_gradients
from lazarus.control.vector import HASH_BITS, Lanes, StepSums, contribution, decode, sample_hash
from lazarus.data.sampler import split_rounds
from lazarus.data.units import Units
from lazarus.errors import BrokenInvariantError, UserMistakeError
from lazarus.model.loss import LossSum
from lazarus.runtime.comm.gathering import gather_texts
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.input.randomness import reseed
from lazarus.runtime.input.reader import Reading
from lazarus.runtime.input.sources import StepShare
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.barrier import Barrier
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.finite import check_total
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.unit_sums import UnitScalars, UnitSums
from lazarus.runtime.training.world import World

Loss = Callable[[nn.Module, Any], LossSum]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How samples become micro-batches; equal on all ranks.

    With ``units`` a micro-batch is a unit, whatever the number of ranks, and all sums run in the
    order of the units.
    """

    seed: int
    global_batch: int
    micro_batch_size: int
    precision: str = "fp32"
    stop_on_nonfinite: bool = False
    units: Units | None = None


class Step:
    """Computes steps of one world, and keeps what the commit needs until the vector is decided."""

    def __init__(
        self,
        replica: Replica,
        world: World,
        *,
        batching: Batching,
        reading: Reading,
        loss: Loss,
        observer: Observer,
        context: WorkerContext,
        hooks: Hooks,
    ) -> None:
        self._replica = replica
        self._world = world
        self._batching = batching
        self._reading = reading
        self._loss = loss
        self._observer = observer
        self._context = context
        self._measures = context.measures
        self._hooks = hooks
        self._units = None if batching.units is None else UnitSums(batching.units)
        self._observer.where.generation = world.generation
        self._observer.where.rank = world.exchange.rank
        self._barrier = Barrier(replica, world, measures=context.measures, units=self._units)
        self._summed: set[int] = set()  # layers whose replica gradients are summed in this step
        self.dense_square = 0.0
        self.shared: StepShare | None = None

    @property
    def must_repeat(self) -> bool:
        """Whether the attempt lacks a buffer or a measure that a rank had not announced."""
        return self._barrier.must_repeat

    def compute(
        self, step: int, *, pause: Callable[[], bool], prepared: Callable[[], None]
    ) -> Lanes:
        """Compute the summed gradients of ``step`` and its summed commit vector.

        Args:
            step: The step.
            pause: Called last: whether this rank wants all ranks to stop after the step (rule 15).
            prepared: Called when every gradient of the step is complete on this rank (rule 9).

        Returns:
            The commit vector, summed over all ranks.

        Raises:
            FencedError, CollectiveError: The attempt is over.
        """
        began = time.monotonic()
        replica, world = self._replica, self._world
        where = self._observer.where
        self._prepare_scratch()
        world.start_step(step)
        where.enter("schedule")
        replica.rates.of(step)
        where.enter("data")
        self._reading.exchange_state(step, world.exchange, device=replica.device)
        shared = self.shared = self._reading.share(step)
        total, aux, count = self._rounds(step, shared)
        where.leave()
        squares = self._sum_gradients(shared)
        prepared()
        own_s = time.monotonic() - began - self._observer.waited_s
        self._observer.drag(own_s)
        own_s = time.monotonic() - began - self._observer.waited_s
        bad = not np.isfinite(total) or not np.isfinite(self.dense_square + squares.sum())
        lanes = contribution(
            world.layout,
            rank=world.exchange.rank,
            generation=world.generation,
            step=step,
            samples=len(shared.mine),
            count=count,
            sample_hash=sample_hash(shared.mine, step=step),
            loss_sum=total,
            aux_sum=aux,
            found_inf=bad,
            pause=pause(),
            own_s=own_s,
        )
        lanes[world.layout.squares] = squares.reshape(-1)
        if world.exchange.rank == 0:
            counts = np.stack([context.counts_E.cpu().numpy() for context in world.contexts])
            lanes[world.layout.counts] = counts.reshape(-1)
        return self._barrier.sum(lanes)

    def _sum_gradients(self, shared: StepShare) -> NDArray[np.float64]:
        """Sum this step's gradients over the ranks, and agree on what all must hold alike.

        Args:
            shared: The samples of the step, and those of this rank.

        Returns:
            Squared gradient norms of the experts whose home this rank is.
        """
        replica, world = self._replica, self._world
        self._observer.enter("grad_sync")
        # Runs beside the replicas' exchanges, which another stream or thread may serve.
        dense = replica.dense_sync.finish(world.exchange)
        for layer in range(len(world.contexts)):
            if layer not in self._summed:
                self._sum_replicas(layer)
        dense.wait()
        self._hooks.gradients(self._context, replica)
        self.dense_square = replica.dense_square_sum()
        squares = replica.expert_square_sums(world.plan.home, world.exchange.rank)
        replica.buffers.exchange(
            world.exchange,
            samples=len(shared.mine),
            total=len(shared.ids_B),
            agree=self._barrier.must_agree,
        )
        if self._barrier.must_agree:
            replica.dense_sync.agree(world.exchange)
            self._agree()
        return squares

    def _overlap(self) -> None:
        """Sum gradients during the next backward, which is the step's last on this rank."""
        sync = self._replica.dense_sync
        if sync.overlaps:
            sync.arm()
            for layer, context in enumerate(self._world.contexts):
                context.after_backward = partial(self._layer_done, layer)

    def _layer_done(self, layer: int) -> None:
        """Sum the gradients that the rest of the backward does not change."""
        self._sum_replicas(layer)
        self._replica.dense_sync.pass_layer(self._world.exchange)

    def _sum_replicas(self, layer: int) -> None:
        bank, context = self._replica.banks[layer], self._world.contexts[layer]
        self._summed.add(layer)
        if bank.is_frozen:
            return
        assert bank.weight.grad is not None
        sum_replica_gradients(
            bank.weight.grad,
            context.table,
            context.exchange,
            served_ER=context.served_ER,
            expert_of_slot=bank.expert_of_slot,
            written=context.written,
        )

    def _agree(self) -> None:
        """Agree on the measures to sum: all that any rank has logged."""
        texts = gather_texts(
            "\n".join(self._measures.logged), self._world.exchange, device=self._replica.device
        )
        found = {name for text in texts for name in text.split("\n") if name}
        self._measures.agree(found | set(self._measures.names))

    def check(self, lanes: Lanes, *, step: int) -> StepSums:
        """Decode the vector, and check it against what the step must contain (rule 12, I9).

        Raises:
            BrokenInvariantError: Generation, step, number of samples or their hash is wrong.
        """
        sums = decode(self._world.layout, lanes)
        assert self.shared is not None
        ids_B = self.shared.ids_B
        expected = sample_hash(ids_B, step=step) % (1 << HASH_BITS)
        size = self._world.layout.world_size
        generation = lanes[self._world.layout.lane("generation")] / size
        wanted = (step, self._world.generation, len(ids_B), expected)
        got = (sums.step, int(generation), sums.samples, sums.sample_hash)
        if wanted != got:
            raise BrokenInvariantError(
                f"commit vector of step {step} says (step, generation, samples, hash) {got}, "
                f"expected {wanted}"
            )
        return sums

    def _prepare_scratch(self) -> None:
        self._replica.zero_gradients()
        self._summed.clear()
        self._measures.start()
        if self._units is not None:
            self._units.start()
        for layer, context in enumerate(self._world.contexts):
            context.start_step()
            context.expected_E = self._replica.expected_fractions(layer)

    def _sizes(self, shared: StepShare) -> tuple[int, ...]:
        """Sizes of this rank's micro-batches. All ranks have the same number; some may be empty."""
        rank, units = self._world.exchange.rank, self._batching.units
        if units is not None and shared.units is not None:
            return tuple(0 if u is None else len(units.samples(u)) for u in shared.units)
        return split_rounds(shared.sizes, self._batching.micro_batch_size)[rank]

    def _rounds(self, step: int, shared: StepShare) -> tuple[float, float, float]:
        totals = np.zeros(3)
        first = 0
        sizes = self._sizes(shared)
        for number, size in enumerate(sizes):
            self._world.start_round(number)
            if number + 1 == len(sizes):
                self._overlap()
            with self._replica.buffers.untouched() if not size else nullcontext():
                sums = self._round(step, shared, first=first, size=size)
            totals += sums
            self._unit_done(number, sums)
            first += size
            if number == 0:
                self._reading.read_ahead(step, self._sizes)
        self._world.meet()
        return float(totals[0]), float(totals[1]), float(totals[2])

    def _unit_done(self, number: int, sums: tuple[float, float, float]) -> None:
        """Keep apart what a round has summed, if the step is dealt by units."""
        if self._units is None or self.shared is None or self.shared.units is None:
            return
        unit = self.shared.units[number]
        if unit is not None:
            total, aux, count = sums
            found = UnitScalars(total=total, aux=aux, count=count, measures=self._measures.take())
            self._units.put(unit, found)
        self._observer.enter("grad_sync")
        self._replica.dense_sync.unit_done(self._world.exchange, number)

    def _round(
        self, step: int, shared: StepShare, *, first: int, size: int
    ) -> tuple[float, float, float]:
        """Forward and backward of one micro-batch; without samples, only its collectives."""
        self._observer.enter("data")
        is_ghost = size == 0
        where, mine = self._observer.where, shared.mine[first : first + size]
        where.enter("data", mine)
        batch = self._reading.batch(step, first=first, size=size)
        batch = move_to(batch, self._replica.device)
        reseed(self._batching.seed, step, int(shared.ids_B[0] if is_ghost else shared.mine[first]))
        self._measures.muted = is_ghost
        for context in self._world.contexts:
            context.ghost = is_ghost
            context.aux_sum = None
        where.enter("forward", mine)
        self._observer.enter("forward")
        with autocast(self._batching.precision, self._replica.device):
            result = self._loss(self._replica.model, batch)
        total, count = checked_loss(result)
        check_total(total, stops=self._batching.stop_on_nonfinite)
        self._measures.muted = False
        parts = [c.aux_sum for c in self._world.contexts if c.aux_sum is not None]
        objective = total + sum(parts) if parts else total
        if is_ghost:
            objective = objective * 0.0
        where.enter("backward", mine)
        self._observer.enter("backward")
        differentiate(objective, [a for c in self._world.contexts for a in c.take_anchors()])
        if is_ghost:
            return 0.0, 0.0, 0.0
        aux = float(sum(float(part.detach()) for part in parts))
        return float(total.detach()), aux, float(count)


def differentiate(objective: Tensor, anchors: Sequence[Tensor]) -> None:
    """Run the backward of the loss and of every MoE layer that ran forward.

    A rank whose loss is constant (all labels masked) must still serve the tokens of its peers.
    Autograd runs nodes in the reverse order of their creation, so all ranks pass the layers in the
    same order, wherever their losses begin.

    Args:
        objective: The micro-batch's loss.
        anchors: One scalar from each forward of an MoE layer.
    """
    roots = [root for root in (objective, *anchors) if root.requires_grad]
    if roots:
        torch.autograd.backward(roots)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Context in which the forward computes in ``precision``: "bf16", or else unchanged."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def checked_loss(result: Any) -> tuple[Tensor, float]:
    """Check the result of the user's loss function, and return its total and count.

    Raises:
        TypeError: The result is not a ``LossSum``; the message shows how to make one.
        UserMistakeError: The count is not a finite number >= 0, or the total not a single number.
    """
    if isinstance(result, Tensor) or not isinstance(result, LossSum):
        raise TypeError(
            f"loss returned {type(result).__name__}; return a sum and its count, since a mean of "
            "means is wrong with uneven shares:\n"
            '    total = F.cross_entropy(logits, targets, reduction="sum")\n'
            "    return LossSum(total, targets.numel())"
        )
    if not isinstance(result.total, Tensor) or result.total.numel() != 1:
        shape = tuple(getattr(result.total, "shape", ()))
        kind = type(result.total).__name__
        raise UserMistakeError(f"LossSum.total must be a tensor of one number, not {kind} {shape}")
    count = float(result.count)
    if not 0 <= count < float("inf"):
        raise UserMistakeError(f"LossSum.count must be a finite number >= 0, not {count}")
    return result.total, count


def move_to(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch to ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and not hasattr(batch, "_fields"):
        return type(batch)(move_to(value, device) for value in batch)
    return batch

"""One generation as one rank computes in it: exchange, routing tables, and the current step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dispatcher.errors import RanksPartedError
from dispatcher.gradients import slots_for_exchange
from dispatcher.layer.dispatch import meet
from dispatcher.layer.places import Meeting, place_code
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import SplitRule
from lazarus.control.vector import VectorLayout
from lazarus.model.context import LayerContext
from lazarus.runtime.comm.gathering import gather_texts
from lazarus.runtime.comm.guarded_exchange import in_layer, trail_of
from lazarus.runtime.comm.standing import Standing
from lazarus.runtime.state.banks import arrange
from lazarus.runtime.state.replica import Replica
from placement import Plan


class World:
    """What a step computes in. Made for each generation, and anew when replicas are added.

    Args:
        replica: This rank's state; its layers are attached to this world.
        plan: The plan in force: that of ``standing`` without replicas that have yet to arrive.
        standing: This rank's place in the generation.
        rule: How token copies are split over replicas.
    """

    def __init__(
        self, replica: Replica, plan: Plan, standing: Standing, *, rule: SplitRule | None = None
    ) -> None:
        self.standing = standing
        self.generation = generation = standing.generation
        self.exchange = exchange = standing.exchange
        self.plan = plan
        self.trail = trail_of(exchange)
        self.step = self.round = -1
        self.device = replica.device
        self.layout = VectorLayout(
            world_size=exchange.size,
            num_layers=len(replica.layers),
            num_experts=replica.num_experts,
        )
        self.contexts = [
            LayerContext(
                layer=index,
                exchange=in_layer(exchange, index),
                table=RoutingTable.from_plan_arrays(
                    plan.expert_of_slot[index],
                    plan.shares[index],
                    rank=exchange.rank,
                    home_E=plan.home[index],
                    generation=generation,
                ),
                rule=rule,
                expected_E=replica.expected_fractions(index),
                counts_E=torch.zeros(replica.num_experts, dtype=torch.int64),
            )
            for index in range(len(replica.layers))
        ]
        for layer, context in zip(replica.layers, self.contexts, strict=True):
            arrange(layer.experts, replica.optimizer, slots_for_exchange(context.table))
            context.written, context.anchors = set(), []
            layer.attach(context)
        replica.dense_sync.begin_generation()

    def start_step(self, step: int) -> None:
        """Begin ``step``: later exchanges are labelled with it."""
        self.step = step
        if self.trail is not None:
            self.trail.start_step(step)

    def start_round(self, number: int) -> None:
        """Begin a micro-batch of the step; -1 means none."""
        self.round = number
        for context in self.contexts:
            context.start_round(step=self.step, number=number)
        if self.trail is not None:
            self.trail.round = number

    def meet(self) -> None:
        """Wait until all ranks are known to have run the same layers.

        Raises:
            RanksPartedError: A rank is still in a layer.
        """
        if self.exchange.size > 1:
            place = place_code(Meeting.BACKWARD_OVER, round=self.round, step=self.step)
            meet(self.contexts[0].table, self.exchange, place=place, device=self.device)
        self.start_round(-1)

    def trail_lanes(self) -> list[float]:
        """Checksum of this step's exchange labels, and its square, to be summed over all ranks."""
        checksum = 0.0 if self.trail is None else float(self.trail.checksum)
        return [checksum, checksum * checksum]

    def require_one_trail(self, summed: NDArray[np.float64]) -> None:
        """Check, from the summed lanes, that all ranks ran the same exchanges.

        Checksums are equal if the mean of their squares is the square of their mean. Without this
        check, exchanges of different layers that happen to match in size give wrong gradients.

        Raises:
            RanksPartedError: Ranks ran different exchanges in this step; raised on all ranks.
        """
        checksums, squares = (int(lane) for lane in summed)
        if self.exchange.size * squares != checksums * checksums:
            newest = "" if self.trail is None else "\n".join(self.trail.newest())
            texts = gather_texts(newest, self.exchange, device=self.device)
            by_number = zip(*(text.split("\n") for text in texts), strict=False)
            odd = next((labels for labels in by_number if len(set(labels)) > 1), None)
            earlier = [f"exchanges of step {self.step} that differ from a peer's"] * len(texts)
            raise RanksPartedError(earlier if odd is None else odd)

"""The commit barrier: one sum over all ranks that decides a step (rule 10 of docs/protocol.md)."""

from __future__ import annotations

import numpy as np
import torch

from lazarus.control.commit.measures import with_measures
from lazarus.control.vector import Lanes
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.context import Measures
from lazarus.runtime.training.unit_sums import UnitSums
from lazarus.runtime.training.world import World

BY_UNIT = ("loss_sum", "aux_sum", "count")  # lanes that are added up in the order of the units


class Barrier:
    """Sums the commit vector over all ranks, together with what the ranks must agree on.

    Args:
        replica: The rank's state, of which the buffers count here.
        world: The generation.
        measures: Values that the user's code has logged.
        units: Scalars by unit if the step is dealt by units, or None.

    Attributes:
        must_repeat: After a sum: the attempt lacks something, and is not to be committed.
        must_agree: In the next attempt the ranks must agree on names of measures and on buffers.
    """

    def __init__(
        self, replica: Replica, world: World, *, measures: Measures, units: UnitSums | None
    ) -> None:
        self._replica, self._world = replica, world
        self._measures, self._units = measures, units
        self.must_repeat = False
        self.must_agree = True

    def sum(self, lanes: Lanes) -> Lanes:
        """Sum the commit vector over all ranks, and return the result on the host.

        Behind the vector's own lanes travel: whether any rank logged a name or wrote a buffer that
        is not agreed on; a check that all ranks ran the same exchanges; the measures; and the
        scalars of each unit.

        Args:
            lanes: This rank's vector; changed in place.

        Raises:
            RanksPartedError: Ranks ran different exchanges in this step; raised on all ranks.
        """
        world, measures, units = self._world, self._measures, self._units
        unknown = [float(measures.has_unknown), float(self._replica.buffers.has_unknown)]
        logged, by_unit = measures.lanes(), np.zeros(0)
        if units is not None:
            by_unit = units.lanes(measures.names)
            lanes[[world.layout.lane(name) for name in BY_UNIT]] = 0.0
            if world.exchange.rank:  # outside of units all ranks log the same
                logged[:] = 0.0
        own = np.concatenate([lanes, unknown, world.trail_lanes(), logged, by_unit])
        summed = torch.from_numpy(own).to(self._replica.device)
        world.exchange.all_reduce(summed, label="commit")
        found: Lanes = summed.cpu().numpy()
        sizes = [lanes.size, 2, 2, logged.size]
        lanes, unknown_sums, trail, logged, by_unit = np.split(found, np.cumsum(sizes))
        new_name, new_buffer = (bool(number > 0) for number in unknown_sums)
        # By units, each step has all values that it logged; else a new name waits for the next.
        self.must_repeat = new_buffer or (units is not None and new_name)
        self.must_agree = new_buffer or new_name
        if units is not None:
            sums = units.totals(by_unit)
            lanes[[world.layout.lane(name) for name in BY_UNIT]] = sums[: len(BY_UNIT)]
            logged += sums[len(BY_UNIT) :]
        world.require_one_trail(trail)
        return with_measures(lanes, measures.names, logged)

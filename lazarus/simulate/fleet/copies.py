"""Snapshots and checkpoints of experts in a simulation, chosen by the production schedule.

Shapes: L placed layers, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.checkpoint.selection.schedule import ScheduleConfig, ScheduleState, select_experts
from lazarus.control.messages import SnapshotHeld
from lazarus.control.ports import Stored
from lazarus.record.loads import Floats
from placement import Plan


class CopyBook:
    """Tracks the newest copies of every expert: snapshots in nodes' host memory, and on storage."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self._state = ScheduleState.initial(config)
        shape = (config.num_layers, config.num_experts)
        self._snapped = np.zeros(shape, dtype=np.int64)
        self._nodes = np.full((2, *shape), -1, dtype=np.int64)  # home node and one other node
        self._stored = np.zeros(shape, dtype=np.int64)
        self._snapped_in = np.zeros(shape, dtype=np.int64)  # generations
        self._stored_in = np.zeros(shape, dtype=np.int64)
        self._snapped_count = np.zeros(shape)  # token copies routed up to that version
        self._stored_count = np.zeros(shape)
        self._unsaved = [[0] * config.num_experts for _ in range(config.num_layers)]
        self.full_step = 0  # step of the newest checkpoint on storage; 0 = none
        self._start = self._storage()  # storage at the start of the present life of the run

    def committed(
        self, first: int, last: int, plan: Plan, *, generation: int, routed_LE: Floats,
        rate_LE: Floats,
    ) -> int:  # fmt: skip
        """Take the snapshots and checkpoints that are due in steps ``first`` to ``last``.

        Args:
            first: First committed step.
            last: Last committed step.
            plan: The plan in force.
            generation: The present generation.
            routed_LE: Token copies routed to each expert up to step ``last``.
            rate_LE: Token copies routed to each expert per step.

        Returns:
            The number of checkpoints written to storage.
        """
        every, persists = self.config.snapshot_every, 0
        if -(-first // every) * every > last:
            return 0
        ids = np.array(plan.node_ids)
        for step in range(-(-first // every) * every, last + 1, every):
            if step < 1:
                continue
            chosen = select_experts(self._state, self.config, step=step, unsaved=self._unsaved)
            if chosen is None:
                continue
            selection, self._state = chosen
            for layer in range(self.config.num_layers):
                saved = list(selection.snapshot[layer])
                self._snapped[layer, saved] = step
                self._snapped_in[layer, saved] = generation
                behind_E = (last - step) * rate_LE[layer]
                self._snapped_count[layer, saved] = (routed_LE[layer] - behind_E)[saved]
                home = plan.home[layer, saved] // plan.ranks_per_node
                self._nodes[0, layer, saved] = ids[home]
                self._nodes[1, layer, saved] = ids[(home + 1) % plan.num_nodes]
                written = list(selection.persist[layer])
                self._stored[layer, written] = step
                self._stored_in[layer, written] = generation
                self._stored_count[layer, written] = (routed_LE[layer] - behind_E)[written]
            if selection.persists:
                persists += 1
                self.full_step = step
        return persists

    def snapped(self, *, alive: set[int]) -> dict[int, tuple[SnapshotHeld, ...]]:
        """Return the snapshots in the host memory of each live node that has any, by node."""
        found: dict[int, list[SnapshotHeld]] = {}
        for place in range(2):
            for layer, expert in np.argwhere(self._nodes[place] >= 0).tolist():
                node = int(self._nodes[place, layer, expert])
                if node in alive:
                    found.setdefault(node, []).append(
                        SnapshotHeld(
                            layer=layer,
                            expert=expert,
                            generation=int(self._snapped_in[layer, expert]),
                            step=int(self._snapped[layer, expert]),
                            routed=int(self._snapped_count[layer, expert]),
                        )
                    )
        return {node: tuple(rows) for node, rows in found.items()}

    def on_storage(self) -> tuple[tuple[Stored, ...], tuple[StoredCheckpoint, ...]]:
        """Return the newest version of each expert on storage, and the checkpoint to use."""
        stored = tuple(
            Stored(
                layer=layer,
                expert=expert,
                generation=int(self._stored_in[layer, expert]),
                step=int(self._stored[layer, expert]),
                routed=int(self._stored_count[layer, expert]),
            )
            for layer, expert in np.argwhere(self._stored > 0).tolist()
        )
        if not stored:
            return (), ()
        newest = max(version.generation for version in stored)
        point = StoredCheckpoint(generation=newest, step=self.full_step, is_full=False)
        return stored, (point,)

    def go_back(self, step: int, *, routed_LE: Floats) -> None:
        """Roll back to a checkpoint: the newest one, or that of the start; drop newer copies.

        Args:
            step: Step of the checkpoint.
            routed_LE: Token copies routed to each expert up to ``step``.
        """
        if step < self.full_step:
            self.full_step, self._stored, self._stored_in, self._stored_count = self._start
            self._start = self._storage()
        if not self.full_step:
            self._state = ScheduleState.initial(self.config)  # so that the next checkpoint is full
        self._nodes[:, self._snapped > step] = -1
        # Rounding must not make a copy newer than the state it was taken from.
        self._stored_count = np.minimum(self._stored_count, routed_LE)
        self._snapped_count = np.minimum(self._snapped_count, routed_LE)

    def counts_on_storage(self) -> list[list[int]]:
        """Return the tokens routed up to the newest version of each expert on storage, [L][E]."""
        counts: list[list[int]] = self._stored_count.astype(np.int64).tolist()
        return counts

    def start_from_storage(self) -> None:
        """Drop all snapshots in host memory, because every node is gone; only storage remains."""
        self._nodes[:] = -1
        self._start = self._storage()

    def _storage(self) -> tuple[int, NDArray[np.int64], NDArray[np.int64], Floats]:
        copied = (self._stored.copy(), self._stored_in.copy(), self._stored_count.copy())
        return (self.full_step, *copied)

"""When one rank saves which experts: a function of committed steps, so equal on all ranks.

Whether a save begins or succeeds does not affect the schedule. So a rank that commits a step late,
by the controller's verdict, still has the same schedule as the others.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lazarus.checkpoint.selection.saving import SaveState
from lazarus.checkpoint.selection.schedule import (
    ScheduleConfig,
    ScheduleState,
    Selection,
    doubled_k,
    rescheduled,
)
from lazarus.control.messages import Resume


class SaveSchedule:
    """The rotation of saves on one rank.

    Args:
        config: The schedule as configured.
        last_step: The step that is followed by a full checkpoint instead; 0 for none.
    """

    def __init__(self, config: ScheduleConfig, *, last_step: int) -> None:
        self._config = config
        self._last_step = last_step
        self._state = SaveState.initial(config)
        self._adapting: Resume | None = None  # RESUME that takes effect at the next commit
        self._due: tuple[int, Selection] | None = None

    @property
    def routed_LE(self) -> NDArray[np.int64]:
        """Copies routed to each expert since step 1, int64 [layers, experts]."""
        return self._state.routed_LE

    def to_text(self) -> str:
        """The schedule's state as JSON."""
        return json.dumps(self._state.to_json())

    def take_text(self, text: str) -> None:
        """Take over what ``to_text`` returned on another rank, or what a checkpoint holds."""
        self._state = SaveState.from_json(json.loads(text))
        self._due = None

    def adapt(self, order: Resume) -> None:
        """Change the schedule as RESUME says, with effect from the next commit."""
        self._adapting = order

    def aligned(self) -> int | None:
        """Forget what is due or pending, because the generation is over.

        A RESUME without a commit after it may not have reached every rank, so it is dropped.

        Returns:
            The step of a checkpoint whose share this rank had not begun to write, or None.
        """
        due, self._adapting, self._due = self._due, None, None
        return due[0] if due is not None and due[1].persists else None

    def committed(self, step: int, counts_LE: NDArray[np.float64]) -> None:
        """Account for a committed step, and choose what to save of it; part of the apply."""
        if self._adapting is not None:
            order, self._adapting = self._adapting, None
            self._state = replace(self._state, schedule=self._adapted(order))
        self._state = self._state.committed(counts_LE)
        self._due = None
        if self._last_step and step >= self._last_step:
            return
        selection, self._state = self._state.next_save(self._config, step=step)
        if selection is not None:
            self._due = (step, selection)

    def take_due(self, step: int) -> Selection | None:
        """What to save of the state after ``step``, or None. The second call returns None."""
        due, self._due = self._due, None
        return due[1] if due is not None and due[0] == step else None

    def _adapted(self, order: Resume) -> ScheduleState:
        schedule = self._state.schedule
        if order.double_k:
            schedule = doubled_k(schedule, self._config, plt_of_present_k=1.0)
        schedule = rescheduled(
            schedule,
            self._config,
            k_snapshot=order.k_snapshot,
            snapshot_every=order.snapshot_every,
            persist_every=order.persist_every,
        )
        if order.save_all:
            schedule = replace(schedule, persisted_once=False)
        return schedule

"""When this rank saves what: a function of committed steps, and so equal on all ranks.

Whether a rank gets to begin a save, and whether the save succeeds, is not in it. So a rank that
commits a step late, by the verdict of a change of members, still agrees with the others.
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
        last_step: The step that a full checkpoint of its own follows; 0: none does.
    """

    def __init__(self, config: ScheduleConfig, *, last_step: int = 0) -> None:
        self._config = config
        self._last_step = last_step
        self._state = SaveState.initial(config)
        self._adapting: Resume | None = None  # its word is not in force yet
        self._due: tuple[int, Selection] | None = None

    @property
    def routed_LE(self) -> NDArray[np.int64]:
        """Routed copies of each expert since step 1."""
        return self._state.routed_LE

    def to_text(self) -> str:
        return json.dumps(self._state.to_json())

    def take_text(self, text: str) -> None:
        """Take over what ``to_text`` gave on another rank, or in a checkpoint."""
        self._state = SaveState.from_json(json.loads(text))
        self._due = None

    def adapt(self, order: Resume) -> None:
        """What RESUME says about the checkpoints to come; in force with the next commit."""
        self._adapting = order

    def aligned(self) -> int | None:
        """The generation is over: forget what it left undone here.

        A RESUME that no commit followed may not have reached every rank, so its word is void.

        Returns:
            The step of a checkpoint that this rank owed a share of and has not begun.
        """
        due, self._adapting, self._due = self._due, None, None
        return due[0] if due is not None and due[1].persists else None

    def committed(self, step: int, counts_LE: NDArray[np.float64]) -> None:
        """Fold a committed step in, and what it saves; part of the apply."""
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
        """What is to be saved of the state after ``step``; asked once."""
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

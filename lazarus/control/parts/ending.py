"""The end of the run: the reason to stop, the last digest and the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lazarus.control.messages import StorageProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How far the run's end has come; ``commit/finalizing.py`` leads it to the last event."""

    stopping: str = ""  # reason to stop; empty: the run goes on
    preempted: bool = False  # the stop comes from the machine, not the user
    finalized: Mapping[str, Any] = field(default_factory=dict)
    finalized_s: float = 0.0  # when the last rank finalized
    digests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    digest: str = ""
    manifest_pending: bool = False  # the final manifest is being written
    final_url: str = ""  # where the last checkpoint is written; empty: at checkpoint_url
    final_problem: StorageProblem | None = None  # why checkpoint_url was not written
    final_bytes: int = 0  # size of the last checkpoint

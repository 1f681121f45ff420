"""The failure that ended a run, as one value passed between all processes.

The process that notices a failure makes a ``Failure``: a worker, the controller or the driver. The
controller writes it into the record (``run_finished``) and sends it to the driver; the trainer
raises the matching exception; the command line prints the message and returns the exit code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

Status = Literal["finished", "stopped", "short", "failed"]


class Cause(StrEnum):
    """Who or what ended a run; ``run_finished`` carries it as ``cause``."""

    NODE = "node"  # too few machines, or none, are left
    USER_CODE = "user_code"  # the user's model, loss, data, optimizer, schedule or hook
    STORAGE = "storage"  # a disk or object store refused a read or write
    INTERNAL = "internal"  # Lazarus itself: a bug, or a process of Lazarus that keeps dying
    REQUEST = "request"  # the user ended the run: Ctrl-C, SIGTERM, ``stop``


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The cause of a run's end, where it happened, its message, and what to do about it.

    Args:
        cause: Who or what ended the run.
        error: Name of the class in ``lazarus.errors`` that the Python API raises.
        message: What happened, with the numbers, in one line.
        way_out: What the reader can do about it; empty if ``message`` says so.
        node, rank, step, phase: Where the failure happened; -1 and empty if unknown.
        sample_ids: Ids of the samples in the micro-batch.
        place: The user's innermost line, "/home/me/train.py:12 in loss".
        traceback: The whole traceback as text.
        shown: The traceback with frames of the user's code only.
        url, operation: The storage that failed, and the operation.
        report: Path of a file to attach to a bug report; empty without one.
        details: Further arguments of the error class, JSON-able.
    """

    cause: Cause
    message: str
    error: str = "LazarusError"
    way_out: str = ""
    node: int = -1
    rank: int = -1
    step: int = -1
    phase: str = ""
    sample_ids: tuple[int, ...] = ()
    place: str = ""
    traceback: str = ""
    shown: str = ""
    url: str = ""
    operation: str = ""
    report: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        """The inverse of ``to_json``. Unknown fields, of another version, are ignored.

        Raises:
            ValueError: The text is not a failure.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not {"cause", "message"} <= found.keys():
            raise ValueError(f"no failure: {text[:80]!r}")
        known = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        known["cause"] = Cause(known["cause"])
        known["sample_ids"] = tuple(known.get("sample_ids", ()))
        return cls(**known)


def exit_code_of(status: Status) -> int:
    """The exit code of the command line for the ``status`` in ``run_finished``.

    "finished" and "stopped" are good ends; a "short" run can be resumed; a "failed" run cannot be
    resumed, or would fail again.
    """
    return {"finished": 0, "stopped": 0, "short": 3, "failed": 1}[status]

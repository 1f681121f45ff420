"""Why a run did not end well: one value, from where it happens to the person who reads it.

Whoever notices a failure makes a ``Failure``: a worker, the controller's decisions, the driver. The
controller puts it into the record (``run_finished``) and hands it to the driver; the trainer raises
the error that belongs to it; the command line prints its message and leaves with its exit code.
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

    NODE = "node"  # machines are gone: too few, or none, are left
    USER_CODE = "user_code"  # the user's model, loss, data, optimizer, schedule or hook
    STORAGE = "storage"  # a disk or object store refused to be written or read
    INTERNAL = "internal"  # Lazarus itself: a bug, or a process of ours that will not live
    REQUEST = "request"  # somebody asked for the end: Ctrl-C, SIGTERM, ``stop``


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Who is to blame, where it happened, what it says, and what to do now.

    Args:
        cause: Who or what ended the run.
        error: Name of the class in ``lazarus.errors`` that the Python API raises.
        message: What happened, with the numbers, in one line.
        way_out: What the reader can do about it; empty where ``message`` says so.
        node, rank, step, phase: Where, as far as it is known; -1 and empty where it is not.
        sample_ids: Samples of the micro-batch that was computed.
        place: The user's innermost line, "/home/me/train.py:12 in loss".
        traceback: Of the exception, as text: whole, as the record keeps it.
        shown: The same for people to read: frames of the user's own code only.
        url, operation: The storage that failed, and what was asked of it.
        report: File with what a bug report needs; empty: there is none.
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
        """Fields that are not known here are ignored: another version may have written them.

        Raises:
            ValueError: It is no failure.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not {"cause", "message"} <= found.keys():
            raise ValueError(f"no failure: {text[:80]!r}")
        known = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        known["cause"] = Cause(known["cause"])
        known["sample_ids"] = tuple(known.get("sample_ids", ()))
        return cls(**known)


def exit_code_of(status: Status) -> int:
    """What the command line returns for the ``status`` that ``run_finished`` records.

    "finished" and "stopped" are good ends; a "short" run can be resumed; a "failed" one cannot, or
    would fail again.
    """
    return {"finished": 0, "stopped": 0, "short": 3, "failed": 1}[status]

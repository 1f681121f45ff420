"""The end of a run, told consistently by its record, its exception and its exit code.

Usually the controller writes ``run_finished`` and sends the ``Failure`` to the driver. If the
controller is gone, the driver writes the event. If the driver was killed too, readers of the
record notice that its owner is gone and add the missing event in memory (``with_end``).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lazarus import errors
from lazarus.basics import tracebacks
from lazarus.basics.careful import lines_backwards
from lazarus.errors import ConfigError, LazarusError, RecordError
from lazarus.failure import Cause, Failure, Status, exit_code_of
from lazarus.record import metrics
from lazarus.record.condensed import condensed_events
from lazarus.record.events import FILE_NAME, Event, encode
from lazarus.record.ownership import owner_of, silence_s
from lazarus.record.status import describe, status_of
from lazarus.version import __version__

_LAST_EVENTS = 50  # events of the record that a report quotes


def error_of(failure: Failure, *, status: Status) -> LazarusError:
    """The exception that the Python API raises for ``failure``; its exit code is ``status``'s."""
    error = _made(failure)
    error.exit_code = exit_code_of(status)
    if not isinstance(error, errors.UserCodeError) and failure.shown:
        error.add_note(failure.shown)
    return error


def _made(failure: Failure) -> LazarusError:
    message, details = failure.message, failure.details
    text = f"{message}; {failure.way_out}" if failure.way_out else message
    kind = failure.error
    if kind == "LazarusError" and failure.cause is Cause.INTERNAL:
        kind = "InternalError"
    match kind:
        case "UserCodeError" | "PoisonedStepError":
            poisoned = failure.error == "PoisonedStepError"
            return (errors.PoisonedStepError if poisoned else errors.UserCodeError)(
                where="" if poisoned else _where(failure),
                summary=text,
                traceback_text=failure.shown,
                rank=failure.rank,
                step=failure.step,
                phase=failure.phase,
                sample_ids=failure.sample_ids,
            )
        case "QuorumTimeoutError":
            return errors.QuorumTimeoutError(
                live=int(details["live"]),
                needed=int(details["needed"]),
                waited_s=float(details["waited_s"]),
                awaited=str(details.get("awaited", "")),
            )
        case "LostExpertError":
            experts = [(int(layer), int(expert)) for layer, expert in details["experts"]]
            return errors.LostExpertError(experts=experts, reason=text)
        case "InternalError":
            where = f"; see {failure.report}" if failure.report else ""
            return errors.InternalError(f"{text}{where}", report=failure.report)
        case "StorageError":
            storage = errors.StorageError(
                url=failure.url, operation=failure.operation, reason=message
            )
            storage.args = (text,)
            return storage
        case "CheckpointError":
            return errors.CheckpointError(text)
        case "StoppedError":
            return errors.StoppedError(text)
        case _:
            return LazarusError(text)


def _where(failure: Failure) -> str:
    """One line: phase and place in the user's code, then node, rank, step and samples."""
    ids = failure.sample_ids
    shown = ", ".join(map(str, ids[:16])) + (" ..." if len(ids) > 16 else "")
    parts = [
        f"node {failure.node}" if failure.node >= 0 else "",
        f"rank {failure.rank}" if failure.rank >= 0 else "",
        f"step {failure.step}" if failure.step >= 0 else "",
        f"sample{'s' if len(ids) > 1 else ''} {shown}" if ids else "",
    ]
    who = ", ".join(part for part in parts if part)
    at = f" at {failure.place}" if failure.place else ""
    return f"{failure.phase or 'user code'}{at}" + (f" ({who})" if who else "")


# ---- ends that the controller did not write --------------------------------------------------


def record_end(run_dir: Path, *, status: Status, failure: Failure | None) -> None:
    """Write ``run_finished`` if the last life of the record has none.

    The event is missing if the controller died. Without a record, nothing is written.
    """
    try:
        events = condensed_events(run_dir)
    except RecordError:
        return
    if _lacks_end(events):
        event = _end(events, status=status, failure=failure, t=time.time())
        try:
            _append(run_dir / FILE_NAME, event)
        except OSError as problem:
            print(f"warning: the record has no end: {problem}", file=sys.stderr)


def _append(place: Path, event: Event) -> None:
    with place.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):  # a line was cut off when its writer died
            file.truncate(end - len(next(lines_backwards(file, end=end), b"")))
        file.seek(0, os.SEEK_END)
        file.write(encode(event).encode())


def with_end(events: Sequence[Event], folder: Path) -> list[Event]:
    """The events, plus a ``run_finished`` if the driver is gone without having written one.

    The added event has ``written`` = False.
    """
    if not _lacks_end(events) or (gone := _who_is_gone(folder)) is None:
        return list(events)
    failure = Failure(
        cause=Cause.NODE,
        error="StoppedError",
        message=f"the driver is gone without a word ({gone})",
        way_out="go on with --resume auto",
    )
    end = _end(events, status="short", failure=failure, t=float(events[-1]["t"]))
    return [*events, {**end, "written": False}]


def is_abandoned(folder: Path) -> bool:
    """Whether the process that owned a run's folder was killed."""
    return _who_is_gone(folder) is not None


def _lacks_end(events: Sequence[Event]) -> bool:
    if not events:
        return False
    return all(event["event"] != "run_finished" for event in metrics.lives(events)[-1])


def _who_is_gone(folder: Path) -> str | None:
    """The owner of the folder, in words, if its process is gone; None if it may be alive."""
    try:
        owner = owner_of(folder)
    except ConfigError:
        return None
    if owner is None or owner.state == "alive":
        return None
    if owner.state == "gone":
        return str(owner)
    silent_s = silence_s(folder, now_s=time.time())
    return f"{owner}, silent for {silent_s:.0f} s" if silent_s > owner.gone_after_s else None


def _end(
    events: Sequence[Event], *, status: Status, failure: Failure | None, t: float
) -> dict[str, Any]:
    newest = events[-1]
    stamp = {"t": t, **({"m": newest["m"]} if "m" in newest else {})}
    return {
        **stamp,
        "event": "run_finished",
        "generation": max(int(e["generation"]) for e in events),
        "status": status,
        "cause": "" if failure is None else str(failure.cause),
        "steps": max(metrics.committed_steps(events), default=0),
        "wall_s": metrics.wall_s(events),
        "goodput_tokens_per_s": metrics.goodput(events),
        "ettr": metrics.ettr(events),
        "plt": metrics.plt(events),
        "error": "" if failure is None else failure.message,
    }


# ---- failures of Lazarus and of callbacks ----------------------------------------------------


def internal_failure(problem: BaseException, *, what: str) -> Failure:
    """The failure for an exception in Lazarus itself; ``what`` says what failed."""
    text = "".join(traceback.format_exception(problem))
    message = f"{what}: {type(problem).__name__}: {problem}".splitlines()[0]
    return Failure(cause=Cause.INTERNAL, error="InternalError", message=message, traceback=text)


def callback_failure(problem: BaseException) -> Failure:
    """The failure for a callback that raised, with ``metrics.on_callback_error = "fail"``."""
    said = tracebacks.describe(problem)
    return Failure(
        cause=Cause.USER_CODE,
        error="UserCodeError",
        message=said.summary,
        phase="callback",
        place=said.place,
        traceback=said.full,
        shown=said.shown,
    )


def write_report(run_dir: Path, failure: Failure) -> str:
    """Write a file with everything that a bug report needs into the run's folder.

    Errors of writing are only printed, so that they do not hide the failure being reported.

    Returns:
        The file's path; empty if the file could not be written.
    """
    path = run_dir / f"internal-error-{datetime.now():%Y%m%d-%H%M%S}.txt"
    try:
        path.write_text(_report(run_dir, failure), encoding="utf-8", errors="backslashreplace")
    except OSError as problem:
        print(f"warning: no report of the failure: {problem}", file=sys.stderr)
        return ""
    return str(path)


def _report(run_dir: Path, failure: Failure) -> str:
    try:
        events: list[Event] = condensed_events(run_dir)
    except RecordError as problem:
        events, state = [], str(problem)
    else:
        state = describe(status_of(events, now_s=time.time()))
    lines = [
        f"lazarus {__version__}, Python {sys.version.split()[0]}, process {os.getpid()}",
        f"failure: {failure.message}",
        f"where: node {failure.node}, rank {failure.rank}, step {failure.step}, {failure.phase}",
        f"state: {state}",
        "\n-- traceback",
        failure.traceback or "(none)",
        "\n-- threads of the driver",
        _stacks(),
        f"\n-- last events of {run_dir / FILE_NAME}",
        *(json.dumps(event)[:2000] for event in events[-_LAST_EVENTS:]),
    ]
    return "\n".join(lines) + "\n"


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"--- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )

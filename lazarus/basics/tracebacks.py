"""Describe exceptions of user code as text of bounded length, with the user's own line.

A frame belongs to the user unless its file is part of this library, of Python or of an installed
package. People are shown the user's frames only; the record keeps the whole traceback.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

UserLine = tuple[CodeType, int]  # code of a user's function, and a line number in it

FULL_LIMIT = 64 << 10  # characters of a traceback in the record
LINE_LIMIT = 400  # characters of an exception's message in texts for people
_SHOWN_FRAMES = 12
_CRASH_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)
_HOME = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_HOME / name}{os.sep}" for name in ("lazarus", "dispatcher", "placement"))
_INSTALLED = tuple(
    f"{place}{os.sep}"
    for name, place in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """An exception as text.

    Attributes:
        summary: Type and message in one line.
        place: The user's innermost line, "/home/me/train.py:12 in loss"; empty without one.
        shown: Traceback with the user's frames only; empty without any.
        full: The whole traceback.
    """

    summary: str
    place: str
    shown: str
    full: str


def describe(problem: BaseException) -> Described:
    """Describe an exception. Works even if the exception's ``__str__`` raises."""
    frames = traceback.extract_tb(problem.__traceback__)
    summary = summary_of(problem)
    own = _users(frames)
    return Described(
        summary=summary,
        place=innermost(frames),
        shown=clean(_shown(own, summary), limit=8 * LINE_LIMIT) if own else "",
        full=clean("".join(traceback.format_exception(problem)), limit=FULL_LIMIT),
    )


def innermost(frames: traceback.StackSummary) -> str:
    """The user's innermost line, as in ``Described.place``; empty if there is none."""
    own = _users(frames)
    return clean(f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}") if own else ""


def calling_line(frame: FrameType | None) -> UserLine | None:
    """The user's innermost line on the stack of a frame; None if there is none.

    This is called for every exchange of a step, so nothing is read or formatted here.
    """
    while frame is not None:
        if not _is_code_of_library(frame.f_code):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def line_text(code: CodeType, line: int) -> str:
    """Format a line of code as in ``Described.place``."""
    return clean(f"{code.co_filename}:{line} in {code.co_name}")


def summary_of(problem: BaseException) -> str:
    """Type and message of an exception in one line of bounded length: ``ValueError: bad label``."""
    name = type(problem).__name__
    try:
        text = str(problem)
    except BaseException as own:  # noqa: BLE001 - the user's __str__ may do anything
        text = f"(its __str__ raised {type(own).__name__})"
    if isinstance(problem, SystemExit) and problem.code is None:
        text = "None"
    line = next((line for line in text[: 8 * LINE_LIMIT].splitlines() if line.strip()), "")
    return clean(f"{name}: {line}" if line else name, limit=LINE_LIMIT)


def clean(text: str, *, limit: int = LINE_LIMIT) -> str:
    """Shorten a text to about ``limit`` characters and escape surrogates and control characters."""
    if len(text) > limit:
        head = limit * 3 // 4
        text = f"{text[:head]} [... {len(text):,} characters in all ...] {text[head - limit :]}"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c >= " " or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def place_of(function: Any) -> str:
    """Where a user's function is defined, as in ``Described.place``; empty if unknown."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        function = inspect.unwrap(function)
    except ValueError:
        return ""
    code = getattr(function, "__code__", None)
    if code is None:
        for name in ("__call__", "__getitem__", "__iter__", "forward", "__init__"):
            code = getattr(getattr(type(function), name, None), "__code__", None)
            if code is not None:
                break
    if code is None or _is_library(code.co_filename):
        return ""
    return clean(f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}")


def place_in_crash(text: str) -> str:
    """The user's innermost line in the output of ``faulthandler``; empty if there is none."""
    own = _crash_frames(text)
    return f"{own[0][0]}:{own[0][1]} in {own[0][2]}" if own else ""


def shown_crash(text: str) -> str:
    """The first line of a ``faulthandler`` output, and the user's frames; empty without any."""
    own = _crash_frames(text)[:_SHOWN_FRAMES]
    lines = [f'  File "{file}", line {line} in {name}' for file, line, name in reversed(own)]
    first = text.splitlines()[0] if text else ""
    return "\n".join([f"{first} (frames of your code only):", *lines]) if own else ""


def _crash_frames(text: str) -> list[tuple[str, str, str]]:
    """The user's frames (file, line, function), most recent call first."""
    return [frame for frame in _CRASH_FRAME.findall(text) if not _is_library(frame[0])]


def chain(problem: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes or contexts, the outermost first."""
    seen: set[int] = set()
    current: BaseException | None = problem
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def is_of_user(problem: BaseException) -> bool:
    """Whether the traceback of an exception contains a frame of user code."""
    return bool(_users(traceback.extract_tb(problem.__traceback__)))


def _users(frames: traceback.StackSummary) -> list[traceback.FrameSummary]:
    return [frame for frame in frames if not _is_library(frame.filename)]


def _is_library(filename: str) -> bool:
    return filename.startswith((*_OURS, *_INSTALLED, "<frozen "))


@functools.lru_cache(maxsize=4096)
def _is_code_of_library(code: CodeType) -> bool:
    return _is_library(code.co_filename)


def _shown(own: list[traceback.FrameSummary], summary: str) -> str:
    kept = own[-_SHOWN_FRAMES:]
    lines = traceback.format_list(kept)
    return "".join(["Traceback (of your code only, most recent call last):\n", *lines, summary])

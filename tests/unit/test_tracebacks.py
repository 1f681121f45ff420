"""Exceptions of the user's code in words, whatever they say and whatever their message is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazarus.basics.format import plural
from lazarus.basics.tracebacks import (
    FULL_LIMIT,
    LINE_LIMIT,
    chain,
    clean,
    describe,
    place_in_crash,
    place_of,
)

HERE = Path(__file__).name


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except BaseException as problem:  # noqa: BLE001 - whatever it is
        return problem
    raise AssertionError("nothing was raised")


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(
        n for n, line in enumerate(lines, start=1) if text in line and "line_of" not in line
    )


def the_users_loss() -> None:
    plural("no number", "step")  # raises inside the library


def test_the_place_is_the_users_innermost_line_and_library_frames_are_left_out() -> None:
    said = describe(raised(the_users_loss))
    assert said.place.endswith(f"{HERE}:{line_of('raises inside the library')} in the_users_loss")
    assert "lazarus/basics/format.py" in said.full
    assert "lazarus/basics/format.py" not in said.shown
    last = said.shown.splitlines()[-5:]
    assert any(
        HERE in line and f"line {line_of('raises inside the library')}" in line for line in last
    )
    assert last[-1] == said.summary


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("file \udcff.txt"),
        ValueError("a\0b\x1b[2J"),
        ValueError("x" * 10_000_000),
        ValueError("line\n" * 100_000),
        Unspeakable(),
        SystemExit(3),
        SystemExit(),
        KeyboardInterrupt(),
        KeyError("k\udc80"),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_whatever_the_message_is_it_can_be_sent_and_is_bounded(problem: BaseException) -> None:
    """C7: a lone surrogate, NUL, 10 MB of text, an exception without words."""

    def raises() -> None:
        raise problem

    said = describe(raised(raises))
    for text in (said.summary, said.place, said.shown, said.full):
        text.encode("utf-8")
        assert not set(text) & {"\0", "\x1b"}
    assert "\n" not in said.summary and len(said.summary) <= LINE_LIMIT + 100
    assert len(said.full) <= FULL_LIMIT + 100
    assert said.summary.startswith(type(problem).__name__)
    assert HERE in said.place


def test_what_is_cut_says_how_much_there_was() -> None:
    text = clean("head" + "x" * 10_000 + "tail", limit=100)
    assert text.startswith("head") and text.endswith("tail") and "10,008 characters" in text


def test_a_function_is_found_behind_partials_methods_and_objects() -> None:
    class Callable_:
        def __call__(self) -> None: ...

    line = the_users_loss.__code__.co_firstlineno
    assert place_of(functools.partial(the_users_loss)).endswith(f"{HERE}:{line} in the_users_loss")
    assert HERE in place_of(lambda step: 1.0)
    assert "in __call__" in place_of(Callable_())
    assert place_of(math.sqrt) == "" == place_of(plural)


def test_the_chain_ends_although_it_may_be_a_ring() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert list(chain(one)) == [one, two]


def test_the_users_line_is_found_in_what_a_crashing_process_wrote() -> None:
    library = Path(place_of.__code__.co_filename)
    text = (
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n"
        f'  File "/usr/lib/python3.11/ctypes/__init__.py", line 519 in string_at\n'
        f'  File "{library}", line 3 in inner\n'
        '  File "/home/me/my train.py", line 7 in loss\n  File "/home/me/main.py", line 1 in main\n'
    )
    text = text.replace("/usr/lib/python3.11/ctypes/__init__.py", functools.__file__)
    assert place_in_crash(text) == "/home/me/my train.py:7 in loss"
    assert place_in_crash("Fatal Python error: Aborted") == ""

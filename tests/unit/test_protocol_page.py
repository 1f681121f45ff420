"""docs/protocol.md names, for each rule, code and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| ([0-9, -]+) \| .* \| (.*) \| (.*) \|")
ROWS = [m for m in map(ROW.fullmatch, (ROOT / "docs/protocol.md").read_text().splitlines()) if m]


def numbers(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_every_rule_has_a_row() -> None:
    assert set().union(*(numbers(row[1]) for row in ROWS)) == set(range(1, 43))


@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_code_and_tests_of_a_rule_are_there(row: re.Match[str]) -> None:
    tests = re.findall(r"`([^`]+)`", row[3])
    assert tests
    for name in tests:
        path, _, function = name.partition("::")
        text = (ROOT / "tests" / path).read_text()
        assert not function or f"def {function}(" in text, name
    for name in re.findall(r"`([^`]+)`", row[2]):
        path, _, members = name.partition(": ")
        if "*" in path:
            continue
        found = [ROOT / "lazarus" / path, ROOT / "dispatcher" / path.removeprefix("dispatcher/")]
        there = [file for file in (*found, ROOT / path) if file.exists()]
        assert there, path
        for member in filter(None, members.split(", ")):
            assert re.search(rf"\b{re.escape(member)}\b", there[0].read_text()), name

"""``tools/mutate.py``: its changes are single and valid, and only what a change did is noticed."""

from __future__ import annotations

import ast
import importlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

SOURCE = '''"""A module."""
LIMIT = -1


@wraps(lambda x: x + 1)
def late(a, b=3 - 2):
    if (
        a < LIMIT  # a comment with < in it
        and not b
    ):
        return True
    total = [x for x in a if x >= b]
    total += 1
    text = f"{a - b}" + "end"
    return "late" if a == b else None
'''


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("mutate_changes")


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("mutate")


def test_every_change_is_another_valid_program_of_as_many_lines(
    changes: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "late.py"
    path.write_text(SOURCE)
    found = changes.changes_of(path, tmp_path)
    texts = set()
    for change in found:
        text = SOURCE[: change.start] + change.new + SOURCE[change.end :]
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(SOURCE))
        assert text.count("\n") == SOURCE.count("\n")
        texts.add(text)
    assert len(texts) == len(found)
    kinds = {change.kind for change in found}
    assert kinds == {"comparison", "edge", "and/or", "not", "sign", "+/-", "if", "return"}


def test_a_change_knows_the_function_in_which_it_runs(changes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text(SOURCE)
    found = {(c.old, c.kind): c.function for c in changes.changes_of(path, tmp_path)}
    assert found["a == b", "comparison"] == 5  # the line of its decorator
    assert found["-1", "sign"] == found["3 - 2", "+/-"] == found["x + 1", "+/-"] == 0


def test_the_same_seed_draws_the_same_changes(changes: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(SOURCE)
    draws = [changes.drawn(tmp_path, root=tmp_path, seed=s, count=5) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len({*draws[0]}) == 5


def test_a_run_notes_the_lines_of_the_folder_that_it_ran(
    mutate: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "late.py"
    text = "def late(a):\n    if a:\n        return 1\n    return [\n        b for b in (a, a)]\n"
    names: dict[str, Callable[[int], object]] = {}
    exec(compile(text, str(path), "exec"), names)
    lines = mutate.Lines(str(tmp_path))
    found = []
    for value in (1, 1, 0):
        lines.start()
        thread = Thread(target=names["late"], args=(value,))
        thread.start()
        thread.join()
        found.append({line for file, line in lines.stop() if file == str(path)})
    assert found == [{2, 3}, {2, 3}, {2, 4, 5}]


def test_only_tests_that_run_a_changed_line_are_run_and_quick_and_near_ones_first(
    mutate: ModuleType, changes: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "late.py"
    path.write_text(SOURCE)
    found = {c.old: c for c in changes.changes_of(path, tmp_path)}
    slow, near, far, other = "test_late.py::c", "test_late.py::d", "test_early.py::b", "a.py::e"
    seconds = {slow: 9.0, near: 0.2, far: 0.1, other: 0.1}
    run_by = {"late.py:8": [slow, far], "late.py:9": [near], "late.py:14": []}
    known = mutate.Known(seconds=seconds, run_by=run_by, cpu_s=1.0)
    assert known.rounds(found["a < LIMIT"]) == [{far: 0.1}, {slow: 9.0}]
    both = next(text for text in found if text.startswith("a < LIMIT") and "not b" in text)
    assert [list(names) for names in known.rounds(found[both])] == [[near, far], [slow]]
    assert [list(names) for names in known.rounds(found[both], longest_s=1.0)] == [[near, far]]
    assert known.rounds(found["a == b"]) == []
    assert sum(map(len, known.rounds(found["-1"]))) == 4  # it runs where it is imported


def _end_of(mutate: ModuleType, work: Callable[[], object], *, wall_s: float) -> str:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (1, 5))
        work()
        os._exit(0)
    os.close(writing)
    run = mutate.Run(tree=Path(), pid=pid, pipe=reading, wall_s=wall_s)
    while (result := run.result()) is None:
        time.sleep(0.01)
    return str(result[1])


def test_a_busy_machine_decides_nothing_and_a_loop_without_end_is_noticed(
    mutate: ModuleType,
) -> None:
    assert _end_of(mutate, lambda: None, wall_s=60.0) == ""
    assert _end_of(mutate, signal.pause, wall_s=0.1) == mutate.UNDECIDED
    assert "s of CPU" in _end_of(mutate, lambda: all(iter(lambda: 1, 0)), wall_s=60.0)

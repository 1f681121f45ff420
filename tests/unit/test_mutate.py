"""Changes for ``tools/mutate.py`` are single, valid, and the same for the same seed."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
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


@pytest.fixture(scope="module")
def changes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate_changes", TOOLS / "mutate_changes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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

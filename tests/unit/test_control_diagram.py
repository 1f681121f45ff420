"""The page with the controller's states is made from the machine, and is current."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = DOCS / "generate_state_diagram.py"
    spec = importlib.util.spec_from_file_location("generate_state_diagram", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_change_of_state_that_happens_is_on_the_page(generator: ModuleType) -> None:
    text = (DOCS / "control_states.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^\| (\w+) \| (\w+) \| \w+", text, flags=re.M))
    happened = {(a.value, b.value) for a, b in generator.arrows(range(30))}
    assert happened - drawn == set()


@pytest.mark.slow
def test_the_page_is_what_the_script_makes(generator: ModuleType) -> None:
    text = (DOCS / "control_states.md").read_text(encoding="utf-8")
    found, hint = generator.arrows(), "run python docs/generate_state_diagram.py"
    assert generator.page(found) == text, hint
    assert generator.picture(found) == (DOCS / "control_states.svg").read_text("utf-8"), hint

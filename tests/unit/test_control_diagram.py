"""The page with the controller's states is made from the machine, and is current."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from control_probes import event_names

from lazarus.control import messages, ports
from lazarus.control.cluster.state import Phase

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = DOCS / "generate_state_diagram.py"
    spec = importlib.util.spec_from_file_location("generate_state_diagram", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_answer_of_the_machine_is_on_the_page(generator: ModuleType) -> None:
    on_page = generator.rows((DOCS / "control_states.md").read_text(encoding="utf-8"))
    seen = generator.observed(range(30))
    assert len(seen) > 100
    assert {row: more for row in seen if (more := seen[row] - on_page.get(row, set()))} == {}
    assert seen.keys() - on_page.keys() == set()


def test_the_page_has_no_state_or_event_that_does_not_exist(generator: ModuleType) -> None:
    on_page = generator.rows((DOCS / "control_states.md").read_text(encoding="utf-8"))
    words = {row[1] for row in on_page}
    assert {row[0] for row in on_page} == set(Phase) - {Phase.ENDED}
    assert {
        word for word in words if not (hasattr(messages, word) or hasattr(ports, word))
    } == set()


def test_no_event_is_missing_in_any_state(generator: ModuleType) -> None:
    on_page = generator.rows((DOCS / "control_states.md").read_text(encoding="utf-8"))
    wanted = {(state, name) for state in set(Phase) - {Phase.ENDED} for name in event_names()}
    assert wanted - {(state, event) for state, event, _ in on_page} == set()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_is_what_the_script_makes(generator: ModuleType) -> None:
    text = (DOCS / "control_states.md").read_text(encoding="utf-8")
    found, hint = generator.observed(), "run python docs/generate_state_diagram.py"
    assert generator.page(found) == text, hint
    picture = generator.picture(generator.arrows(found))
    assert picture == (DOCS / "control_states.svg").read_text("utf-8"), hint

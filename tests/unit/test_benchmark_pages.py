"""benchmarks/README.md has one row per question, and each figure stands on the page it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LOG = sorted((BENCHMARKS / "log").glob("*.md"))
HEADS = ["Command", "Machine", "Table", "Conclusion", "What failed"]
LINK = re.compile(r"\[(\d{4}-\d\d-\d\d)\]\(log/([^)]+)\)")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+")


def rows() -> list[list[str]]:
    lines = (BENCHMARKS / "README.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "](log/" in line]
    return [row for row in cells if len(row) == 6]


@pytest.mark.parametrize("page", LOG, ids=lambda page: page.stem)
def test_a_log_page_has_the_five_heads_and_is_named_by_its_date(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADS
    assert text.startswith(f"# {page.name[:10]}: ")
    for _, body in zip(HEADS, text.split("\n## ")[1:], strict=True):
        assert body.partition("\n")[2].strip(), f"{page.name}: nothing under a head"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_figure_of_a_row_stands_on_the_page_of_its_date(row: list[str]) -> None:
    _, script, figure, spread, baseline, date = row
    found = LINK.fullmatch(date)
    assert found is not None, date
    text = (BENCHMARKS / "log" / found[2]).read_text()
    assert found[2].startswith(found[1])
    for cell in (figure, spread, baseline):
        known = NUMBER.findall(text)
        assert set(NUMBER.findall(cell)) <= set(known), f"{cell} is not on {found[2]}"
    for name in re.findall(r"`(\w+\.py)", script):
        assert (BENCHMARKS / name).exists() or list(BENCHMARKS.parent.glob(f"tests/*/{name}")), name


def test_every_log_page_and_every_script_can_be_found_from_the_readme() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    assert {page.name for page in LOG} == set(re.findall(r"\(log/([^)]+\.md)\)", text))
    scripts = {p.name for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()}
    helpers = {"goodput_peers.py"}  # started by goodput_under_faults.py
    assert scripts - helpers <= set(re.findall(r"`(\w+\.py)", text))


def front_rows() -> list[list[str]]:
    lines = (BENCHMARKS.parent / "README.md").read_text().splitlines()
    return [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if "](benchmarks/" in line
    ]


@pytest.mark.parametrize("row", [r for r in front_rows() if len(r) == 5], ids=lambda row: row[0])
def test_the_front_page_has_one_figure_a_cell_and_each_is_in_the_log(row: list[str]) -> None:
    _, ours, other, figure, measured = row
    found = re.fullmatch(r"\[(.*)\]\(benchmarks/(log/.*\.md)\)", measured)
    assert found is not None
    text = (BENCHMARKS / found[2]).read_text()
    known = {"1", *NUMBER.findall(text)}
    for cell in (ours, other, figure):
        numbers = NUMBER.findall(cell)
        assert len(numbers) <= 1, cell
        assert set(numbers) <= known, cell

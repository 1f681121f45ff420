"""CONTRIBUTING's worked examples are followed: applied to a copy of the sources, then checked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, Block, blocks_of, commands_of

PAGE = ROOT / "CONTRIBUTING.md"
PLACE = re.compile(r"# (\S+), (below|above) the line: (.*)")


def examples() -> dict[str, list[Block]]:
    """Title -> the blocks under it, for all examples that have some."""
    titles, found = "", {}
    lines = PAGE.read_text().splitlines()
    blocks = {block.line: block for block in blocks_of(PAGE)}
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") and not line.startswith("# l"):
            titles = line.removeprefix("### ")
        if number in blocks:
            found.setdefault(titles, []).append(blocks[number])
    return found


def insert(block: Block, sources: Path) -> bool:
    """Put the block where its first line says; False: it is a check."""
    head, _, body = block.text.partition("\n")
    place = PLACE.fullmatch(head)
    if place is None:
        return False
    path, side, wanted = sources / place[1], place[2], place[3]
    lines = path.read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.strip() == wanted]
    found = found or [i for i, line in enumerate(lines) if line.strip().startswith(wanted)]
    assert len(found) == 1, f"{block.name}: {len(found)} lines in {place[1]} are {wanted!r}"
    at = found[0] + (side == "below")
    path.write_text("\n".join([*lines[:at], *body.splitlines(), *lines[at:]]) + "\n")
    return True


def check(block: Block, sources: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(sources)}
    if block.language == "python":
        commands = [f"{sys.executable} - <<'END'\n{block.text}END"]
    else:
        shim = f'lazarus() {{ {sys.executable} -m lazarus "$@"; }}; set -o pipefail; '
        commands = [shim + command.text for command in commands_of(block)]
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=sources,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{block.name}: {command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("title", examples())
def test_a_worked_example_can_be_followed(title: str, tmp_path: Path) -> None:
    for package in ("lazarus", "placement", "dispatcher"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    is_check = [not insert(block, tmp_path) for block in examples()[title]]
    assert is_check == sorted(is_check), "a check comes behind the insertions"
    assert not all(is_check)
    assert any(is_check)
    for block in examples()[title][is_check.index(True) :]:
        check(block, tmp_path)


def test_there_is_an_example_for_a_key_a_fault_and_a_message() -> None:
    assert list(examples()) == ["Add a configuration key", "Add a fault", "Add a message"]

"""The code blocks of README and docs, and how a test runs them.

A block is run as it stands unless a marker above it says otherwise:

    <!-- block: needs a cluster -->   commands for a cluster: they are only parsed
    <!-- block: run by PATH -->       the file PATH runs it
    <!-- block: file NAME -->         saved as NAME in the working folder, then run
    <!-- block: output -->            what the Python block before it prints
    <!-- block: drawing -->           no code at all
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lazarus import cli

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(r"<!-- block: (.+?) -->")
FENCE = re.compile(r"^( *)```(.*)$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: str  # path below the root
    line: int
    language: str
    marker: str  # empty: the block is run as it stands
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page that people read, apart from the changelog and the log of benchmarks."""
    roots = ("README.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md")
    return [*(ROOT / name for name in roots), *sorted(ROOT.glob("docs/**/*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The page's fenced blocks, in order."""
    lines = page.read_text().splitlines()
    found, at = [], 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
        marker = MARKER.fullmatch(lines[at - 1].strip()) if at else None
        found.append(
            Block(
                page=str(page.relative_to(ROOT)),
                line=at + 1,
                language=fence[2].strip(),
                marker="" if marker is None else marker[1],
                text=textwrap.dedent("\n".join(lines[at + 1 : end])) + "\n",
            )
        )
        at = end + 1
    return found


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a console block, and the lines that the page shows below it."""

    text: str
    shown: tuple[str, ...]


def commands_of(block: Block) -> list[Command]:
    """Commands behind ``$``, continued by a backslash; all other lines are output."""
    found: list[tuple[str, list[str]]] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            text = line[2:]
            while text.endswith("\\"):
                text = text[:-1].rstrip() + " " + next(lines).strip()
            found.append((re.sub(r"\s+# .*$", "", text).strip(), []))
        else:
            assert found, f"{block.name}: output before a command"
            found[-1][1].append(line)
    return [Command(text=text, shown=tuple(shown)) for text, shown in found]


def run_command(text: str, words: Mapping[str, str]) -> tuple[int, str]:
    """Run it; ``lazarus`` in this process, what is behind a pipe or another program by bash.

    Args:
        text: The command.
        words: What stands for the page's placeholders, such as RUN.

    Returns:
        Exit code, and what it wrote to stdout.
    """
    for word, meaning in words.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", meaning, text)
    own, _, rest = (part.strip() for part in text.partition(" | "))
    own, _, target = (part.strip() for part in own.partition(" > "))
    first, *arguments = shlex.split(own)
    if first != "lazarus":
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(arguments)
    if target:
        Path(target).write_text(out.getvalue())
    if rest:
        piped = subprocess.run(
            ["bash", "-c", rest], input=out.getvalue(), capture_output=True, text=True, timeout=60
        )
        return code, piped.stdout
    return code, out.getvalue()


def is_shown(shown: tuple[str, ...], output: str) -> bool:
    """Whether the page's lines are in the output in this order; ``...`` stands for anything."""
    wanted = [re.escape(line.strip()).replace(r"\.\.\.", ".*") for line in shown if line.strip()]
    rest = iter(line.strip() for line in output.splitlines())
    return all(any(re.fullmatch(line, found) for found in rest) for line in wanted if line != ".*")


def inline_commands() -> Iterator[tuple[str, str]]:
    """(page, command) for each ``lazarus ...`` that stands in the text between backticks."""
    for page in pages():
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`(lazarus [^`]+)`", text):
            yield str(page.relative_to(ROOT)), command

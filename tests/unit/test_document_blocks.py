"""No block of README and docs is without a test, and what pages name is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from documents import ROOT, Block, all_blocks, commands_of, inline_commands, is_shown, pages

from lazarus import cli
from lazarus.config.layers import keys_of, sections_of
from lazarus.config.train_config import TrainConfig

RUNNABLE = {"console", "python"}
FILES = re.compile(
    r"`((?:lazarus|placement|dispatcher|tests|benchmarks|examples|deploy|tools|configs|docs)"
    r"/[\w/.-]+\.\w+)(?:: ([\w, .]+))?`"
)


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.name)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    kind, _, argument = block.marker.partition(" ")
    if block.marker in ("drawing", "output"):
        assert block.language == "text"
    elif block.marker.startswith("run by "):
        by = ROOT / block.marker.removeprefix("run by ")
        assert by.is_file(), by
        if block.language == "console" and "blocks_of(" not in by.read_text():
            for command in commands_of(block):  # `make demo`: the file speaks of a demo
                assert command.text.split()[-1] in by.read_text(), command.text
    elif block.marker == "needs a cluster":
        assert block.language == "console"
        assert commands_of(block)
    else:
        assert block.marker == "" or (kind == "file" and argument), block.marker
        assert block.language in RUNNABLE, f"{block.name}: no test runs {block.language!r}"


def test_output_that_a_page_does_not_have_right_is_noticed() -> None:
    output = "loss 3.2\nnode 1 lost in step 6\nback in 0.3 s\n"
    assert is_shown(("loss 3.2", "...", "back in ... s"), output)
    assert not is_shown(("loss 3.3",), output)
    assert not is_shown(("back in 0.3 s", "loss 3.2"), output)
    assert not is_shown(("node 1 lost",), output)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_stand_in_fences_where_a_test_finds_them(page: Path) -> None:
    for line in page.read_text().splitlines():
        assert not re.match(r"    (?:\$|lazarus|python) ", line), line


@pytest.mark.parametrize(
    ("page", "command"), sorted(set(inline_commands())), ids=lambda text: text.replace("/", ".")
)
def test_a_command_in_the_text_exists_with_its_options(page: str, command: str) -> None:
    command = re.split(r" [>|] | \.\.\.|,? \(", command)[0]
    words = command.split()[1:]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = words[0].split("|")
    assert set(names) <= {*cli.command_names(), "--help"}, page
    for name in names:
        parser = cli._parser([name])
        choices = next(a.choices for a in parser._actions if isinstance(a.choices, dict))
        own = choices[name]
        actions = [a.choices for a in own._actions if isinstance(a.choices, dict)]
        if actions and len(words) > 1 and not words[1].startswith("-"):
            asked = words[1].split("|")
            assert set(asked) <= set(actions[0]), f"{page}: {command}"
            own = actions[0][asked[0]]
        assert set(options) <= set(own._option_string_actions), f"{page}: {command}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_files_and_functions_that_a_page_names_are_there(page: Path) -> None:
    text, keys = page.read_text(), set(keys_of(TrainConfig))
    for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)(?: ?=[^`]*)?`", text):
        if section in sections_of(TrainConfig) and not (ROOT / f"{section}.{name}").exists():
            is_field = name in ("npz", "json", "py", "toml", "safetensors")
            assert is_field or f"{section}.{name}" in keys, f"{section}.{name}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= set(targets)
    assert all((ROOT / path).is_file() for path in re.findall(r"`python ([\w/]+\.py)", text))
    for path, members in FILES.findall(text):
        assert list(ROOT.glob(path)), path
        for member in filter(None, members.split(", ")):
            source = (ROOT / path).read_text()
            assert re.search(rf"\b{re.escape(member)}\b", source), f"{path}: {member}"


LINKING = [*pages(), ROOT / "CHANGELOG.md", *sorted(ROOT.glob("benchmarks/log/*.md"))]


def anchors_of(page: Path) -> set[str]:
    """The headings' anchors, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{page.name}: {target}"


def test_the_page_of_commands_is_current() -> None:
    path = ROOT / "tools" / "command_reference.py"
    spec = importlib.util.spec_from_file_location("command_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = ROOT / "docs" / "reference" / "commands.md"
    assert page.read_text() == module.page(), f"run: python {path.relative_to(ROOT)} > {page}"


def test_every_page_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in pages():
        name = str(page.relative_to(ROOT))
        assert name.startswith("docs/adr/0") or name in text, name
    decisions = (ROOT / "docs" / "adr" / "README.md").read_text()
    assert all(f"({page.name})" in decisions for page in ROOT.glob("docs/adr/0*.md"))


def test_the_fastest_commands_of_the_map_select_tests_that_exist() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    commands = re.findall(r"`pytest ([^`]+)`", page)
    assert len(commands) > 10
    for command in commands:
        words = command.split(" -m ")[0].split()
        key = words[words.index("-k") + 1] if "-k" in words else ""
        for path in words[: words.index("-k") if key else None]:
            assert (ROOT / path).exists(), command
            assert not key or list((ROOT / path).glob(f"test_*{key}*.py")), command

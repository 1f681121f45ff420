"""README and docs are run: every block that no marker excuses, in the order of its page."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, Block, blocks_of, commands_of, is_shown, pages, run_command

from lazarus import ElasticTrainer, TrainConfig
from lazarus.config.layers import Given
from lazarus.record.events import FIELDS
from lazarus.run.result import Result

SOURCE = "docs/tutorials/own-model.md"  # its run is the record that other pages look at
# Pages say what a reader would say; here processes are plain, and models and batches small.
SMALL = {
    "cluster.launcher": "process",
    "metrics.progress": "off",
    "model.layers": 2,
    "model.dim": 32,
    "model.heads": 2,
    "model.seq_len": 32,
    "train.global_batch": 8,
    "optim.warmup_steps": 2,
    "cluster.replace_lost": False,
}
pytestmark = pytest.mark.timeout(240)


class Reader:
    """Runs the blocks of one page after another, as its reader would.

    Args:
        folder: Where it works.
        words: What stands for placeholders of a page, such as RUN.
        record: What ``fit()`` gives without training again; None: it trains.
    """

    def __init__(self, folder: Path, words: dict[str, str], record: Result | None = None) -> None:
        self.folder, self.words, self.record = folder, words, record
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def follow(self, block: Block) -> None:
        if block.marker == "output":
            assert block.text == self.printed, (
                f"{block.name}: the block above prints something else"
            )
        elif block.language == "python":
            if block.marker.startswith("file "):
                (self.folder / block.marker.removeprefix("file ")).write_text(block.text)
            out = io.StringIO()
            with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as once:
                if self.record is not None:
                    once.setattr(ElasticTrainer, "fit", lambda trainer: self.record)
                exec(compile(block.text, block.name, "exec"), self.names)
            self.printed = out.getvalue()
        else:
            self.type_in(block)

    def type_in(self, block: Block) -> None:
        for command in commands_of(block):
            code, output = run_command(command.text, self.words)
            assert code == 0, f"{block.name}: {command.text}: {output}"
            assert is_shown(command.shown, output), f"{block.name}: {command.text}: {output}"
            pattern = re.search(r" \| grep (.*?)(?: \||$)", command.text)
            if pattern is not None and not output:
                # Nothing of the kind happened in this run; then it must be an event that can.
                names = set(re.findall(r"[\w ]{3,}", pattern[1].replace("-e", " ")))
                assert {n.strip() for n in names} <= set(FIELDS), f"{block.name}: {pattern[1]}"


def run_blocks(page: Path, reader: Reader) -> None:
    found_in = list(sys.path)  # commands look for modules in the folder where they are typed
    try:
        with contextlib.chdir(reader.folder):
            for block in blocks_of(page):
                if block.marker in ("", "output") or block.marker.startswith("file "):
                    reader.follow(block)
    finally:
        sys.path[:] = found_in
        forget_modules(reader.folder)


def forget_modules(folder: Path) -> None:
    """Let the next page import files of the same names anew."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_relative_to(folder):
            del sys.modules[name]
    importlib.invalidate_caches()


def working_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    for shared in ("configs", "examples"):
        (folder / shared).symlink_to(ROOT / shared)
    return folder


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Small runs: in Python by flags, which win; on the command line by the environment."""
    patch = pytest.MonkeyPatch()
    load = TrainConfig.load
    flags = {key: Given(value, "test") for key, value in SMALL.items()}

    def small(*args: Any, **options: Any) -> TrainConfig:
        given = {**flags, **options.pop("flags", {})}
        return load(*args, flags=given, **options)

    patch.setattr(TrainConfig, "load", small)
    patch.setenv("COLUMNS", "80")
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Result:
    """The tutorial's own run: three nodes, one of them killed."""
    folder = working_folder(tmp_path_factory.mktemp("record"), "own")
    reader = Reader(folder, {})
    with contextlib.chdir(folder):
        for block in blocks_of(ROOT / SOURCE):
            if block.language == "python" and "load_file" not in block.text:
                reader.follow(block)
    result = reader.names["result"]
    assert isinstance(result, Result)
    return result


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in pages() if blocks_of(p)], ids=ids)
def test_the_blocks_of_a_page_do_what_it_says(
    page: Path, record: Result, patched: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = str(Path(record.run_dir).resolve())
    words = {"RUN": run, "RUN_DIR": run, "CONFIG.toml": "configs/tiny.toml"}
    run_blocks(page, Reader(working_folder(tmp_path, "reader"), words, record))

"""Documents of a data set by index: text files, lines of JSON, parquet files, saved ``datasets``.

A document is a text, or the messages of a conversation. Only an index is held in memory.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lazarus.config.preflight import SAVED_DATASET
from lazarus.data.corpus import python_sources_folder, text_files
from lazarus.errors import DataError

Message = Mapping[str, Any]  # at least "role" and "content"
Document = str | Sequence[Message]
Kind = Literal["text", "jsonl", "parquet", "datasets"]

MESSAGES = "messages"  # the column of conversations, if there is none of the configured name
_JSONL = (".jsonl", ".ndjson")
_PIECE = 1 << 20  # characters of a text file that are read at once
_SCANNED = 64 << 20  # bytes of a file that are searched for line ends at once
_GROUPS = 4  # row groups of parquet files that are held


class Documents(ABC):
    """A data set's documents, in an order that is the same on every machine.

    Args:
        path: The file or folder, for messages.
        column: Name of the column that holds documents; ``messages`` if there is no such column.
        files: The files of the data set, whose change makes it another one.
    """

    def __init__(self, path: Path, column: str, files: Sequence[Path]) -> None:
        self.path, self._column, self.files = path, column, tuple(files)

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def __getitem__(self, index: int) -> Document:
        """A document; of a long text file, its first piece."""

    def pieces(self) -> Iterator[tuple[Document, bool]]:
        """All documents in order, in pieces, and whether a piece is the last of its document."""
        for index in range(len(self)):
            yield self[index], True

    def _chosen(self, columns: Sequence[str]) -> str:
        """The column that holds documents.

        Raises:
            DataError: There is neither the configured column nor ``messages``.
        """
        for name in (self._column, MESSAGES):
            if name in columns:
                return name
        raise DataError(
            f"data.path={self.path} has no column {self._column!r} (there: "
            f"{', '.join(sorted(columns)) or 'none'}); set data.text_key"
        )

    def _checked(self, value: Any, where: str) -> Document:
        if isinstance(value, str):
            return value
        if isinstance(value, Sequence) and value and all(map(_is_message, value)):
            return [_without_nothing(message) for message in value]
        raise DataError(
            f"{where} holds {type(value).__name__}; a document is a text, or a list of messages "
            f'with "role" and "content"'
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _without_nothing(message: Message) -> Message:
    """A message without the keys that only other messages of its column have."""
    return {k: v for k, v in message.items() if v is not None or k == "content"}


class TextFiles(Documents):
    """Each file is a document."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return next(self._pieces_of(self.files[index]))

    def pieces(self) -> Iterator[tuple[Document, bool]]:
        for file in self.files:
            before = None
            for piece in self._pieces_of(file):
                if before is not None:
                    yield before, False
                before = piece
            assert before is not None
            yield before, True

    def _pieces_of(self, file: Path) -> Iterator[str]:
        """The text in pieces of about ``_PIECE`` characters that end with a line; at least one."""
        try:
            with file.open(encoding="utf-8", newline="") as text:
                yield text.read(_PIECE) + text.readline(_PIECE)
                while piece := text.read(_PIECE):
                    yield piece + text.readline(_PIECE)
        except UnicodeDecodeError as problem:
            raise DataError(f"{file} is not UTF-8 text: {problem.reason}") from problem


class JsonLines(Documents):
    """Each line of each file is a JSON object with a document; lines of blanks are none."""

    def __init__(self, path: Path, column: str, files: Sequence[Path]) -> None:
        super().__init__(path, column, files)
        self._maps = [_mapped(file) for file in files]
        self._lines = [_lines_of(content) for content in self._maps]
        self._ends = list(accumulate(len(lines) for lines in self._lines))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        which = bisect_right(self._ends, index)
        row = index - (self._ends[which - 1] if which else 0)
        first, last = self._lines[which][row]
        line = self._maps[which][first:last].tobytes()
        where = f"{self.files[which]}, object {row + 1}"
        try:
            found = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{where} is not JSON: {problem}") from problem
        if not isinstance(found, dict):
            raise DataError(f"{where} is a {type(found).__name__}; a JSON object is needed")
        return self._checked(found[self._chosen(list(found))], where)


def _mapped(file: Path) -> NDArray[np.uint8]:
    if not file.stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(file, dtype=np.uint8, mode="r")


def _lines_of(content: NDArray[np.uint8]) -> NDArray[np.int64]:
    """First byte and end of each line that is more than blanks, [lines, 2]."""
    ends = [
        np.flatnonzero(content[first : first + _SCANNED] == ord("\n")) + first
        for first in range(0, len(content), _SCANNED)
    ]
    last = np.concatenate([*ends, [len(content)]]).astype(np.int64)
    lines = np.stack([np.concatenate([[0], last[:-1] + 1]), last], axis=1)
    lines = lines[lines[:, 1] > lines[:, 0]]
    starts_blank = np.isin(content[lines[:, 0]], np.frombuffer(b" \t\r", dtype=np.uint8))
    for at in np.flatnonzero(starts_blank):  # few: writers of JSON lines do not indent
        first, last_byte = lines[at]
        starts_blank[at] = not content[first:last_byte].tobytes().strip()
    found: NDArray[np.int64] = lines[~starts_blank]
    return found


class Parquet(Documents):
    """Rows of parquet files; row groups are read when they are needed, the document column only."""

    def __init__(self, path: Path, column: str, files: Sequence[Path]) -> None:
        super().__init__(path, column, files)
        from pyarrow import ArrowException, parquet

        try:
            self._open = [parquet.ParquetFile(file, memory_map=True) for file in files]
        except (ArrowException, OSError) as problem:
            raise DataError(f"data.path={path} is not parquet: {problem}") from problem
        self._key = self._chosen(self._open[0].schema_arrow.names) if files else column
        for name, file in zip(files, self._open, strict=True):
            if self._key not in file.schema_arrow.names:
                raise DataError(f"{name} has no column {self._key!r}, which {files[0].name} has")
        self._groups = [
            (which, group)
            for which, file in enumerate(self._open)
            for group in range(file.metadata.num_row_groups)
        ]
        self._ends = list(accumulate(self._rows(*place) for place in self._groups))
        self._held: OrderedDict[int, Any] = OrderedDict()

    def _rows(self, which: int, group: int) -> int:
        return int(self._open[which].metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        which = bisect_right(self._ends, index)
        row = index - (self._ends[which - 1] if which else 0)
        return self._checked(self._group(which)[row].as_py(), f"{self.path}, row {index + 1}")

    def _group(self, which: int) -> Any:
        """The document column of a row group; the last few are held."""
        if which not in self._held:
            file, group = self._groups[which]
            table = self._open[file].read_row_group(group, columns=[self._key])
            self._held[which] = table.column(self._key)
        self._held.move_to_end(which)
        while len(self._held) > _GROUPS:
            self._held.popitem(last=False)
        return self._held[which]


class SavedDataset(Documents):
    """Rows of a folder that ``datasets.Dataset.save_to_disk`` wrote, mapped into memory."""

    def __init__(self, path: Path, column: str, files: Sequence[Path]) -> None:
        super().__init__(path, column, files)
        from datasets import DatasetDict, load_from_disk

        found = load_from_disk(str(path), keep_in_memory=False)
        if isinstance(found, DatasetDict):
            if "train" not in found:
                raise DataError(f"data.path={path} has the parts {', '.join(found)}; name a folder")
            found = found["train"]
        self._key = self._chosen(found.column_names)
        self._rows = found.select_columns([self._key])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        return self._checked(self._rows[index][self._key], f"{self.path}, row {index + 1}")


_OPENED: Mapping[Kind, Callable[[Path, str, Sequence[Path]], Documents]] = {
    "text": TextFiles,
    "jsonl": JsonLines,
    "parquet": Parquet,
    "datasets": SavedDataset,
}


def kind_of(path: Path) -> Kind:
    """The form of a file or folder; a folder with parquet or JSON lines holds those alone."""
    if not path.is_dir():
        return _kind_of_name(path.name)
    if any((path / name).is_file() for name in SAVED_DATASET):
        return "datasets"
    kinds = {_kind_of_name(file.name) for file in text_files(path)}
    return "parquet" if "parquet" in kinds else "jsonl" if "jsonl" in kinds else "text"


def _kind_of_name(name: str) -> Kind:
    return "parquet" if name.endswith(".parquet") else "jsonl" if name.endswith(_JSONL) else "text"


def open_documents(path: str | None, *, column: str) -> Documents:
    """Open the documents of a file or folder; None: the source files of Python's library.

    Args:
        path: A text, JSON lines or parquet file, or a folder of them, or of a saved ``datasets``.
        column: Name of the column that holds documents, except in text files.

    Raises:
        DataError: There is nothing at ``path``, or it has no documents.
    """
    if path is None:
        root = python_sources_folder()
        return TextFiles(root, column, list(text_files(root, suffix=".py")))
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"data.path={path} is not there")
    kind = kind_of(place)
    files = list(text_files(place)) if place.is_dir() else [place]
    if kind == "text":
        files = [file for file in files if not _is_binary(file)]
    elif kind != "datasets":
        files = [file for file in files if _kind_of_name(file.name) == kind]
    documents = _OPENED[kind](place, column, files)
    if not len(documents):
        raise DataError(f"data.path={path} has no documents in it")
    return documents


def _is_binary(file: Path) -> bool:
    with file.open("rb") as content:
        return b"\0" in content.read(1 << 16)

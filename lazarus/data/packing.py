"""Tokenised documents as samples: packed into windows, or one padded sample for each document.

A sample is ``{"input_ids": int64 [S], "labels": int64 [S]}``, a padded one with ``attention_mask``
too. ``labels`` repeat ``input_ids``, with -100 where a token does not count: padding, and in
conversations all but the assistant's words.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazarus.data.documents import Document, Documents, Message
from lazarus.data.tokenizing import Tokenizer
from lazarus.errors import DataError

IGNORED = -100
_SILENT = np.uint32(1 << 31)  # bit of a stored token that does not count
_BATCH = 256  # documents that are tokenised at once
_FORMAT = 1
_STALE_S = 86_400.0  # age of unfinished files, whose writer is gone
_PART = ".part"


class Packed:
    """Map-style windows of ``seq_len`` tokens of a stream of documents.

    Args:
        stream: Stored tokens, see ``token_stream``.
        seq_len: Tokens of a window.
        first: The first window to use.
        last: The window after the last one to use; None: all that follow.
        name: Names the data in messages.

    Raises:
        DataError: The stream does not have these windows.
    """

    def __init__(
        self, stream: NDArray[np.uint32], *, seq_len: int, first: int = 0, last: int | None = None,
        name: str = "data.path",
    ) -> None:  # fmt: skip
        total = len(stream) // seq_len
        self._stream, self._seq_len = stream, seq_len
        self._first, self._last = first, total if last is None else last
        if not 0 <= self._first < self._last <= total:
            raise DataError(
                f"{name} has {len(stream):,} tokens = {total} windows of {seq_len}; windows "
                f"{self._first} to {self._last} are not there; use more text or a smaller "
                f"data.seq_len"
            )

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = (self._first + index) * self._seq_len
        window = np.asarray(self._stream[start : start + self._seq_len])
        ids = (window & ~_SILENT).astype(np.int64)
        labels = np.where(window & _SILENT, IGNORED, ids)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


class Padded:
    """Map-style documents, each cut or padded on the right to ``seq_len`` tokens.

    Args:
        documents: The documents.
        tokenizer: Makes tokens of them, when a sample is asked for.
        seq_len: Tokens of a sample.
        first: The first document to use.
        last: The document after the last one to use; None: all that follow.
    """

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, *, seq_len: int, first: int = 0,
        last: int | None = None,
    ) -> None:  # fmt: skip
        self._documents, self._tokenizer, self._seq_len = documents, tokenizer, seq_len
        self._first, self._last = first, len(documents) if last is None else last
        if not 0 <= self._first < self._last <= len(documents):
            raise DataError(
                f"{documents.path} has {len(documents):,} documents; documents {self._first} to "
                f"{self._last} are not there"
            )

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        document = self._documents[self._first + index]
        stored = padded_tokens(document, self._tokenizer)
        size = min(len(stored), self._seq_len)
        ids = np.full(self._seq_len, self._tokenizer.pad, dtype=np.int64)
        labels = np.full(self._seq_len, IGNORED, dtype=np.int64)
        mask = np.zeros(self._seq_len, dtype=np.int64)
        ids[:size] = stored[:size] & ~_SILENT
        labels[:size] = np.where(stored[:size] & _SILENT, IGNORED, ids[:size])
        mask[:size] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
        }


def padded_tokens(document: Document, tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """Tokens of a document on its own: end-of-text behind a text, nothing behind a conversation."""
    if isinstance(document, str):
        return _text_row(tokenizer.encode([document])[0], tokenizer, is_last=True)
    return _chat_row(document, tokenizer)


def stream_tokens(
    pieces: list[tuple[Document, bool]], tokenizer: Tokenizer, *, begins: bool
) -> list[NDArray[np.uint32]]:
    """Tokens of pieces of documents, with end-of-text behind each document.

    Args:
        pieces: Documents or pieces of them, and whether a piece is the last of its document.
        tokenizer: Makes the tokens.
        begins: The first piece begins a document.
    """
    opens = [begins, *(is_last for _, is_last in pieces[:-1])]
    texts = [
        (piece, is_open)
        for (piece, _), is_open in zip(pieces, opens, strict=True)
        if isinstance(piece, str)
    ]
    encoded = iter(_encoded(texts, tokenizer))
    found = []
    for piece, is_last in pieces:
        if isinstance(piece, str):
            found.append(_text_row(next(encoded), tokenizer, is_last=is_last))
            continue
        row = _chat_row(piece, tokenizer)
        if tokenizer.end is not None and (not len(row) or row[-1] & ~_SILENT != tokenizer.end):
            row = np.append(row, np.uint32(tokenizer.end) | _SILENT)  # the template's end counts
        found.append(row)
    return found


def _encoded(texts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[list[int]]:
    if all(is_open for _, is_open in texts):
        return tokenizer.encode([text for text, _ in texts]) if texts else []
    return [tokenizer.encode([text], begins=is_open)[0] for text, is_open in texts]


def _text_row(ids: list[int], tokenizer: Tokenizer, *, is_last: bool) -> NDArray[np.uint32]:
    closed = bool(ids) and ids[-1] == tokenizer.end
    if tokenizer.end is not None and is_last != closed:
        ids = [*ids, tokenizer.end] if is_last else ids[:-1]
    return np.array(ids, dtype=np.uint32)


def _chat_row(messages: Sequence[Message], tokenizer: Tokenizer) -> NDArray[np.uint32]:
    ids, counts = tokenizer.converse(messages)
    row = np.array(ids, dtype=np.uint32)
    row[~np.array(counts, dtype=bool)] |= _SILENT
    return row


# ---- the stream of a data set --------------------------------------------------------------------


def token_stream(documents: Documents, tokenizer: Tokenizer, *, column: str) -> NDArray[np.uint32]:
    """All documents as one memory-mapped row of tokens, each document ended by end-of-text.

    The row is made once for each state of files and tokenizer, and kept in ``cache_folder()``.
    Processes that make it at the same time do not wait for each other; the first one's is taken.

    Raises:
        DataError: The tokenizer has no end-of-text token.
    """
    if tokenizer.end is None:
        raise DataError(
            f"{tokenizer.name} has no end-of-text token to put between documents; name eos_token "
            f"in tokenizer_config.json, or set data.packing=false"
        )
    folder = cache_folder()
    place = folder / f"{_fingerprint(documents, tokenizer, column)}.u32"
    if not place.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            _write(place, documents, tokenizer)
        except OSError as problem:
            raise DataError(
                f"tokens of data.path cannot be kept in {folder}: {problem}"
            ) from problem
    if not place.stat().st_size:
        return np.empty(0, np.uint32)
    return np.memmap(place, dtype="<u4", mode="r")


def cache_folder() -> Path:
    """Where tokens are kept: ``lazarus/tokens`` below ``XDG_CACHE_HOME``, else ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lazarus" / "tokens"


def _fingerprint(documents: Documents, tokenizer: Tokenizer, column: str) -> str:
    seen: list[Any] = [_FORMAT, tokenizer.digest(), column, type(documents).__name__]
    for file in documents.files:
        found = file.stat()
        seen.append([str(file.absolute()), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


def _write(place: Path, documents: Documents, tokenizer: Tokenizer) -> None:
    with tempfile.NamedTemporaryFile(dir=place.parent, suffix=_PART, delete=False) as file:
        part = Path(file.name)
        try:
            is_whole = _fill(file, documents, tokenizer, stops=place.is_file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    if is_whole:
        part.replace(place)
    else:
        part.unlink(missing_ok=True)


def _fill(
    file: IO[bytes], documents: Documents, tokenizer: Tokenizer, *, stops: Callable[[], bool]
) -> bool:
    """Write all tokens; False if ``stops`` says that another process has been faster."""
    begins = True
    for batch in _batches(documents):
        for row in stream_tokens(batch, tokenizer, begins=begins):
            file.write(row.astype("<u4").tobytes())
        begins = batch[-1][1]
        if stops():
            return False
    return True


def _batches(documents: Documents) -> Iterator[list[tuple[Document, bool]]]:
    batch: list[tuple[Document, bool]] = []
    size = 0
    for piece, is_last in documents.pieces():
        batch.append((piece, is_last))
        size += len(piece) if isinstance(piece, str) else 0
        if len(batch) == _BATCH or size > 1 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sweep(folder: Path) -> None:
    """Delete unfinished files whose writers were killed."""
    for part in folder.glob(f"*{_PART}"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _STALE_S:
                part.unlink()

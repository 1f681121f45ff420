"""Token sequences from text files, folders, token files, or Python's own source code.

Text is read as bytes: one token per byte, a vocabulary of 256. Token files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazarus.config.presets import BYTE_VOCAB
from lazarus.errors import DataError

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)
_CHECKED_TOKENS = 1 << 22
_BIN_DTYPES = {".u8.bin": "<u1", ".u16.bin": "<u2", ".u32.bin": "<u4", ".bin": "<u2"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """One long sequence of tokens, and a short name for it. Token files are memory-mapped."""

    tokens: NDArray[Any]  # integer [M], any integer dtype
    name: str
    vocab: int | None  # 256 for text, None for token files

    def digest(self) -> str:
        """A fingerprint of length, dtype and 64 evenly spread pages, to compare between ranks."""
        size = int(self.tokens.shape[0])
        seen = hashlib.sha256(f"{size}:{self.tokens.dtype.str}".encode())
        for start in range(0, size, max(1, size // 64)):
            seen.update(np.ascontiguousarray(self.tokens[start : start + 1024]).tobytes())
        return seen.hexdigest()[:16]


class TokenDataset:
    """Map-style data set of windows: item i is ``{"tokens": int64 [seq_len + 1]}``.

    Neighbouring windows share one token. Runs in every worker.

    Args:
        corpus: The tokens.
        seq_len: Positions of a training sample; a window has one token more.
        first: The first window of the corpus to use.
        last: The window after the last one to use; None means all that follow.

    Raises:
        DataError: The corpus does not have these windows.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, first: int = 0, last: int | None = None):
        total = num_windows(corpus, seq_len=seq_len)
        self.corpus, self.seq_len = corpus, seq_len
        self._first, self._last = first, total if last is None else last
        if not 0 <= self._first < self._last <= total:
            raise DataError(
                f"{corpus.name} has {corpus.tokens.shape[0]:,} tokens = {total} windows of "
                f"{seq_len} + 1; windows {self._first} to {self._last} are not there; "
                f"use more text or a smaller data.seq_len"
            )

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = (self._first + index) * self.seq_len
        window = np.asarray(self.corpus.tokens[start : start + self.seq_len + 1])
        return {"tokens": torch.from_numpy(window.astype(np.int64))}


def num_windows(corpus: Corpus, *, seq_len: int) -> int:
    """Number of windows of ``seq_len + 1`` tokens if neighbours share one token."""
    return max(0, (int(corpus.tokens.shape[0]) - 1) // seq_len)


def load_corpus(path: str | None = None) -> Corpus:
    """Open a text file, a folder of text, a ``.npy`` or ``.bin`` token file, or the default text.

    Args:
        path: The file or folder; None means the source files of Python's standard library.
            ``.bin`` files hold little-endian uint16 tokens without a header, ``.u8.bin`` and
            ``.u32.bin`` files tokens of the named width.

    Raises:
        DataError: There is nothing at ``path``, or it does not hold tokens.
    """
    if path is None:
        return _python_sources()
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        raise DataError(f"data.path={path} is not there; give a text file, a folder, .npy or .bin")
    if place.suffix in (".npy", ".bin"):
        return _token_file(place)
    return Corpus(tokens=_bytes_of(place.read_bytes(), place), name=place.name, vocab=BYTE_VOCAB)


def datasets(
    corpus: Corpus, *, seq_len: int, split: float
) -> tuple[TokenDataset, TokenDataset | None]:
    """Split a corpus into training windows (its first part) and held-out windows.

    Args:
        corpus: The tokens.
        seq_len: Positions of a training sample.
        split: Share of the windows to train on, 0 to 1.

    Returns:
        The training windows, and the held-out windows or None if none are left.
    """
    total = num_windows(corpus, seq_len=seq_len)
    cut = min(total, max(1, int(total * split)))
    train = TokenDataset(corpus, seq_len=seq_len, first=0, last=cut)
    held_out = TokenDataset(corpus, seq_len=seq_len, first=cut) if cut < total else None
    return train, held_out


def check_tokens(corpus: Corpus, *, vocab: int) -> None:
    """Refuse tokens outside ``[0, vocab)``, looking at the first 4 million tokens.

    Raises:
        DataError: Names an offending token and the vocabulary that it needs.
    """
    seen = np.asarray(corpus.tokens[:_CHECKED_TOKENS])
    low, high = int(seen.min(initial=0)), int(seen.max(initial=0))
    if low < 0 or high >= vocab:
        raise DataError(
            f"{corpus.name} holds token {high if high >= vocab else low}, but model.vocab={vocab}; "
            f"use model.vocab >= {high + 1}"
        )


def python_sources_folder() -> Path:
    """The folder of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _python_sources() -> Corpus:
    root = python_sources_folder()
    joined = b"\n".join(path.read_bytes() for path in text_files(root, suffix=".py"))
    if len(joined) < 1 << 16:
        raise DataError(f"no Python sources below {root}; give data.path instead")
    return Corpus(tokens=_bytes_of(joined, root), name="python-stdlib", vocab=BYTE_VOCAB)


def _folder(root: Path) -> Corpus:
    joined = b"\n".join(
        content for path in text_files(root) if b"\0" not in (content := path.read_bytes())
    )
    return Corpus(tokens=_bytes_of(joined, root), name=root.name, vocab=BYTE_VOCAB)


def text_files(root: Path, *, suffix: str = "") -> Iterator[Path]:
    """Files below ``root``, without hidden ones, in an order that is the same on every machine."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(
            n for n in names if not n.startswith(".") and not (suffix and n in _SKIPPED_FOLDERS)
        )
        for name in sorted(files):
            if not name.startswith(".") and name.endswith(suffix):
                yield Path(folder, name)


def _bytes_of(content: bytes, place: Path) -> NDArray[np.uint8]:
    if not content:
        raise DataError(f"data.path={place} has no text in it")
    return np.frombuffer(content, dtype=np.uint8)


def _token_file(place: Path) -> Corpus:
    try:
        if place.suffix == ".npy":
            tokens = np.load(place, mmap_mode="r", allow_pickle=False)
        else:
            kind = next(s for s in _BIN_DTYPES if place.name.endswith(s))
            tokens = np.memmap(place, dtype=_BIN_DTYPES[kind], mode="r")
    except (ValueError, OSError) as error:
        raise DataError(f"data.path={place} is not a token file: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"data.path={place} holds {tokens.dtype} {list(tokens.shape)}; "
            f"one row of integers is needed"
        )
    return Corpus(tokens=tokens, name=place.name, vocab=None)

"""A file of bounded size with the expert loads of a run's steps.

The file has a header, then for each step its number and the routed copies, uint32 [L, E]. When the
file exceeds its bound, every second step is removed, and later steps are thinned out likewise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lazarus.basics.careful import open_regular
from lazarus.basics.files import replaced

MOST_BYTES = 64 << 20
_MAGIC = b"LZLOADS1"
_HEAD = struct.Struct("<8sqqq")  # magic, layers, experts, stride
_STEP = struct.Struct("<q")
_MOST_CELLS = 1 << 26

Row = tuple[int, NDArray[np.float64]]


class LoadHistory:
    """Writes the file. There must be only one writer at a time.

    Args:
        path: The file; continued if it exists.
        most_bytes: Bound for the file's size.
    """

    def __init__(self, path: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most = most_bytes
        self._waiting: list[Row] = []
        head = _head_of(path)
        self._stride = 1 if head is None else head[2]

    def wants(self, step: int) -> bool:
        """Whether the loads of a step are to be kept."""
        return step % self._stride == 0

    def add(self, step: int, counts_LE: NDArray[np.float64]) -> None:
        """Add the routed copies [L, E] of a committed step; ``flush`` writes them."""
        self._waiting.append((step, counts_LE))

    def flush(self) -> None:
        """Write the added steps, and thin out the file while it exceeds its bound."""
        if not self._waiting:
            return
        shape = self._waiting[0][1].shape
        known = _head_of(self._path)
        stride = known[2] if known is not None and known[:2] == shape else 0
        mode = "ab" if stride else "wb"
        with self._path.open(mode) as out:
            if not stride:
                stride = 1
                out.write(_HEAD.pack(_MAGIC, *shape, stride))
            for step, counts in self._waiting:
                if step % stride == 0:
                    out.write(_record(step, counts))
            size = out.tell()
        self._waiting.clear()
        while size > self._most:
            stride *= 2
            size = self._thin(shape, stride)
        self._stride = stride

    def _thin(self, shape: tuple[int, ...], stride: int) -> int:
        with replaced(self._path) as partial, partial.open("wb") as out:
            out.write(_HEAD.pack(_MAGIC, *shape, stride))
            for step, counts in each_load(self._path):
                if step % stride == 0:
                    out.write(_record(step, counts))
            return out.tell()


def _record(step: int, counts: NDArray[np.float64]) -> bytes:
    rounded = np.clip(np.rint(counts), 0, 2**32 - 1).astype("<u4")
    return _STEP.pack(step) + rounded.tobytes()


def _head_of(path: Path) -> tuple[int, int, int] | None:
    """Layers, experts and stride from the header; None if there is no valid file."""
    try:
        with open_regular(path) as file:
            data = file.read(_HEAD.size)
    except FileNotFoundError:
        return None
    magic, layers, experts, stride = _HEAD.unpack(data) if len(data) == _HEAD.size else (b"",) * 4
    sound = magic == _MAGIC and stride > 0 and layers >= 0 and experts >= 0
    if not sound or layers * experts > _MOST_CELLS:
        return None
    return layers, experts, stride


def each_load(path: Path) -> Iterator[Row]:
    """Yield step and routed copies [L, E], in the order of commits.

    A step that was committed again appears again. An incomplete last entry is ignored, as is a
    file with an invalid header.

    Raises:
        OSError: The file cannot be read.
    """
    head = _head_of(path)
    if head is None:
        return
    layers, experts, _ = head
    size = _STEP.size + 4 * layers * experts
    with open_regular(path) as file:
        file.seek(_HEAD.size)
        while len(record := file.read(size)) == size:
            counts = np.frombuffer(record, dtype="<u4", offset=_STEP.size).astype(np.float64)
            yield _STEP.unpack_from(record)[0], counts.reshape(layers, experts)

"""Tensors of a folder of safetensors files, read one by one.

Each read opens a file, reads one range into new memory and closes the file. No file is mapped, so
that a process holds no more of a checkpoint than the tensors that were asked for.

Source: the safetensors format description (header length u64 LE, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Readable(Protocol):
    """A tensor on storage, which is read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def read(self, row: int | None = None) -> Tensor:
        """Read the tensor, or ``tensor[row : row + 1]`` alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: Its name in the file.
        file: The file.
        dtype: The dtype in which the file stores the tensor.
        shape: Shape of the tensor.
        begin: Offset of its first byte in the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, row: int | None = None) -> Tensor:
        """Read the tensor, or ``tensor[row : row + 1]`` alone.

        Raises:
            ValueError: The file ends before the tensor does.
        """
        shape, begin = self.shape, self.begin
        if row is not None:
            shape = (1, *shape[1:])
            begin += row * math.prod(shape) * self.dtype.itemsize
        content = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        if content.numel() and _fill(content, self.file, begin) < content.numel():
            raise ValueError(f"{self.file} ends within {self.name}; copy the file again")
        return content.view(self.dtype).view(shape)


def _fill(content: Tensor, file: Path, begin: int) -> int:
    view: memoryview = content.numpy().data
    with file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        done = 0
        while done < len(view):
            got = stream.readinto(view[done:])
            if not got:
                break
            done += got
    return done


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model's folder, by name. Reads headers only.

    Raises:
        ValueError: The folder has no safetensors files, a file is missing or is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files(folder):
        found |= {tensor.name: tensor for tensor in _tensors_of(file)}
    return found


def _files(folder: Path) -> Sequence[Path]:
    index = folder / INDEX
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = sorted(folder / name for name in names)
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        others = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; found {others}, which is not the safetensors format" if others else ""
        raise ValueError(f"{folder} has no {', '.join(missing[:3])}{hint}")
    return files


def _tensors_of(file: Path) -> list[StoredTensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            entries: Mapping[str, Mapping[str, Any]] = json.loads(stream.read(length))
        return [
            StoredTensor(
                name=name,
                file=file,
                dtype=_DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
                begin=8 + length + int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a safetensors file that can be read: {error}") from error

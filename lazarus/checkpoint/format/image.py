"""Images: the safetensors layout of a record in memory, on the wire and on disk.

A record (an expert, or a shard of the dense state) is laid out once, in host memory, as a complete
safetensors file, its image. The same bytes are sent to other nodes and written to storage, so one
checksum is valid everywhere and nothing is serialised twice. This module only computes and parses
layouts, without torch and files. The safetensors library can read every image (tested).

Source: the safetensors format description (header length u64 LE, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazarus.checkpoint.errors import DamagedError

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
MAX_HEADER_BYTES = 100_000_000
_ALIGNMENT = 64
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, dtype (safetensors name) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count

    def to_json(self) -> list[Any]:
        """Compact JSON-able form."""
        return [self.name, self.dtype, list(self.shape)]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> TensorSpec:
        """The inverse of ``to_json``."""
        name, dtype, shape = data
        return cls(name=str(name), dtype=str(dtype), shape=tuple(int(s) for s in shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """The byte layout of an image.

    ``header`` goes to offset 0; tensor i's bytes go to ``offsets[i]``, in the order of ``specs``.
    """

    header: bytes
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    num_bytes: int


def layout_image(specs: Sequence[TensorSpec], *, metadata: Mapping[str, str]) -> ImageLayout:
    """Lay out an image. Wide dtypes come first, so every tensor is aligned to its item size.

    Raises:
        ValueError: Two tensors have one name, or a dtype is unknown to the format.
    """
    ordered = sorted(specs, key=lambda s: (-ITEM_BYTES.get(s.dtype, 0), s.name))
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    starts: list[int] = []
    end = 0
    for spec in ordered:
        if spec.dtype not in ITEM_BYTES:
            raise ValueError(f"{spec.name}: dtype {spec.dtype} is unknown to safetensors")
        if spec.name in entries:
            raise ValueError(f"two tensors are named {spec.name}")
        starts.append(end)
        end += spec.num_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return ImageLayout(
        header=header,
        specs=tuple(ordered),
        offsets=tuple(len(header) + start for start in starts),
        num_bytes=len(header) + end,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedImage:
    """The header of an image: tensors in byte order, the offset of each, and the metadata."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    metadata: Mapping[str, str]


def parse_image(data: bytes | bytearray | memoryview) -> ParsedImage:
    """Read and check an image's header against its length.

    Raises:
        DamagedError: The data is too short, has no safetensors header, or the tensors' ranges
            leave gaps or overlap.
    """
    return parse_header(data, num_bytes=len(data))


def header_length(data: bytes | bytearray | memoryview, *, num_bytes: int) -> int:
    """Bytes of the JSON header, from the first eight bytes of a file of ``num_bytes``.

    Raises:
        DamagedError: The file is too short to have a header of this length.
    """
    if len(data) < 8:
        raise DamagedError(f"{len(data)} bytes are too short for a safetensors header")
    (length,) = struct.unpack("<Q", bytes(data[:8]))
    if length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise DamagedError(f"header of {length} bytes in a file of {num_bytes}: truncated")
    return int(length)


def parse_header(data: bytes | bytearray | memoryview, *, num_bytes: int) -> ParsedImage:
    """``parse_image`` of a file of which only the beginning, with the header, was read.

    Raises:
        DamagedError: See ``parse_image``.
    """
    length = header_length(data, num_bytes=num_bytes)
    try:
        entries = json.loads(bytes(data[8 : 8 + length]))
        metadata = {str(k): str(v) for k, v in entries.pop(_METADATA, {}).items()}
        rows = sorted(
            (int(v["data_offsets"][0]), int(v["data_offsets"][1]), name, v)
            for name, v in entries.items()
        )
        specs = tuple(
            TensorSpec(name=n, dtype=str(v["dtype"]), shape=tuple(int(s) for s in v["shape"]))
            for _, _, n, v in rows
        )
        _check_tiling(specs, [row[:2] for row in rows], num_bytes - 8 - length)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DamagedError(f"not a safetensors header: {error!r}") from error
    return ParsedImage(
        specs=specs, offsets=tuple(8 + length + row[0] for row in rows), metadata=metadata
    )


def _check_tiling(
    specs: Sequence[TensorSpec], ranges: Sequence[tuple[int, int]], num_bytes: int
) -> None:
    end = 0
    for spec, (start, stop) in zip(specs, ranges, strict=True):
        if start != end or stop - start != spec.num_bytes:
            raise DamagedError(f"{spec.name} claims bytes {start}..{stop}, expected from {end}")
        end = stop
    if end != num_bytes:
        raise DamagedError(f"tensors take {end} bytes, the file has {num_bytes}: truncated")

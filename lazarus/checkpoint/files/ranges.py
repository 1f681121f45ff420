"""Read single tensors of a safetensors file, without reading the rest of it. EFFECTS."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lazarus.basics.careful import open_regular
from lazarus.checkpoint.errors import DamagedError
from lazarus.checkpoint.files.storage import Storage, file_size, storage_error
from lazarus.checkpoint.files.tensors import DTYPE_NAMES
from lazarus.checkpoint.format.image import TensorSpec, header_length, parse_header

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def read_range(storage: Storage, path: str, *, start: int, num_bytes: int) -> bytearray:
    """Read ``num_bytes`` of a file from ``start`` on.

    Raises:
        DamagedError: The file is missing or ends before.
        StorageError: The file cannot be read.
    """
    full = storage.full(path)
    data = bytearray(num_bytes)
    try:
        if storage.is_local:
            with open_regular(full) as file:
                file.seek(start)
                got = file.readinto(data)  # type: ignore[attr-defined]
        else:
            data = bytearray(storage.fs.cat_file(full, start=start, end=start + num_bytes))
            got = len(data)
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing") from error
    except Exception as error:
        raise storage_error(error, url=storage.place(path), operation="read") from error
    if got != num_bytes:
        raise DamagedError(f"{path} ends after {start + got} bytes: truncated")
    return data


class TensorFile:
    """The tensors of one safetensors file; each is read on demand, the header once."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path

    @cached_property
    def _places(self) -> dict[str, tuple[TensorSpec, int]]:
        num_bytes = file_size(self._storage, self._path)
        if num_bytes is None:
            raise DamagedError(f"{self._path} is missing")
        first = read_range(self._storage, self._path, start=0, num_bytes=min(8, num_bytes))
        length = header_length(first, num_bytes=num_bytes)
        head = read_range(self._storage, self._path, start=0, num_bytes=8 + length)
        parsed = parse_header(head, num_bytes=num_bytes)
        places = zip(parsed.specs, parsed.offsets, strict=True)
        return {spec.name: (spec, offset) for spec, offset in places}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            DamagedError: The file is missing or damaged, or lacks the tensor.
            StorageError: The file cannot be read.
        """
        if name not in self._places:
            raise DamagedError(f"{self._path} lacks {name}")
        spec, start = self._places[name]
        dtype = TORCH_DTYPES[spec.dtype]
        if not spec.num_bytes:
            return torch.empty(spec.shape, dtype=dtype)
        data = read_range(self._storage, self._path, start=start, num_bytes=spec.num_bytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(spec.shape)

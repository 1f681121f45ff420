"""Conversion of torch tensors to images and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from lazarus.checkpoint.errors import DamagedError
from lazarus.checkpoint.files.store import Record, RecordKey, Tag
from lazarus.checkpoint.format.image import ImageLayout, TensorSpec

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


_GIVEN_DTYPES: Mapping[str, str] = {
    "bf16": "BF16",
    "bfloat16": "BF16",
    "fp16": "F16",
    "float16": "F16",
    "fp32": "F32",
    "float32": "F32",
}


def dtype_named(text: str) -> str:
    """The safetensors name of a dtype given as bf16, bfloat16, fp16, float16, fp32 or float32.

    Raises:
        ValueError: The name is unknown.
    """
    if text not in _GIVEN_DTYPES:
        raise ValueError(f"dtype {text!r} is none of {', '.join(_GIVEN_DTYPES)}")
    return _GIVEN_DTYPES[text]


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of each tensor.

    Raises:
        ValueError: A dtype that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: dtype {tensor.dtype} cannot be checkpointed")
    return tuple(
        TensorSpec(name=name, dtype=DTYPE_NAMES[t.dtype], shape=tuple(t.shape))
        for name, t in tensors.items()
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor. A contiguous tensor shares its memory with the result."""
    flat: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def fill_image(target: memoryview, layout: ImageLayout, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into an image. The copies release the interpreter lock and use one thread.

    Args:
        target: Host memory, at least ``layout.num_bytes`` long.
        layout: Layout of exactly these tensors.
        tensors: On any device; CUDA tensors are copied by the current stream, synchronously.
    """
    flat = np.frombuffer(target, dtype=np.uint8)
    flat[: len(layout.header)] = np.frombuffer(layout.header, dtype=np.uint8)
    for spec, offset in zip(layout.specs, layout.offsets, strict=True):
        source = tensors[spec.name]
        place = flat[offset : offset + spec.num_bytes]
        if source.device.type == "cpu":
            np.copyto(place, np.frombuffer(bytes_of(source), dtype=np.uint8))
        elif spec.num_bytes:
            view = torch.from_numpy(place).view(source.dtype).view(source.shape)
            view.copy_(source.detach())


def record_of(key: RecordKey, tensors: Mapping[str, Tensor], *, tag: Tag) -> Record:
    """Make a record that refers to the tensors' own memory.

    The tensors must not change until the record is written.
    """
    layout = key.layout(specs_of(tensors), tag)
    chunks: Sequence[memoryview | bytes] = [
        layout.header,
        *(bytes_of(tensors[spec.name]) for spec in layout.specs),
    ]
    return Record(key=key, specs=layout.specs, chunks=chunks)


def tensors_of(image: bytes | bytearray | memoryview, *, where: str) -> dict[str, Tensor]:
    """The tensors of an image, copied.

    Raises:
        DamagedError: ``image`` is not a complete safetensors image; ``where`` names it.
    """
    try:
        return dict(load_safetensors(bytes(image)))
    except SafetensorError as error:
        raise DamagedError(f"{where} is not a safetensors image: {error}") from error

"""Quantised tensors of a checkpoint, presented as the tensors that they stand for.

Two formats are read: fp8 with a scale for each block (DeepSeek-V3), and mxfp4 (gpt-oss). Values are
float32. Quantised tensors are only read: a run trains and saves float32 masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lazarus.hf.stored import Readable, StoredTensor

FORMATS = ("fp8", "mxfp4")
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_NAMES = ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """An fp8 tensor [..., R, C] with one scale for each block of its last two axes.

    Attributes:
        values: The fp8 values.
        scales: Scales [..., blocks of rows, blocks of columns], or one scale for the tensor.
        block: Rows and columns of a block; the last blocks of an axis may be smaller. None: blocks
            of equal size.
    """

    values: StoredTensor
    scales: StoredTensor
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.values.shape

    def read(self, row: int | None = None) -> Tensor:
        """Read and dequantise the tensor, or ``tensor[row : row + 1]`` alone."""
        if row is not None and len(self.shape) < 3:  # a row is less than a block
            return self.read()[row : row + 1]
        shared = len(self.scales.shape) < len(self.shape)  # one scale for all rows
        scales = _scale_values(self.scales.read(None if shared else row))
        return dequantised_fp8(self.values.read(row), scales, block=self.block)


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor:
    """An mxfp4 tensor [E, C, R] stored as blocks [E, R, C / 32, 16] and scales [E, R, C / 32]."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        experts, rows, groups, width = self.blocks.shape
        return experts, groups * width * 2, rows

    def read(self, row: int | None = None) -> Tensor:
        """Read and dequantise the tensor, or ``tensor[row : row + 1]`` alone."""
        return dequantised_mxfp4(self.blocks.read(row), self.scales.read(row))


def dequantised_fp8(
    values: Tensor, scales: Tensor, *, block: tuple[int, int] | None = None
) -> Tensor:
    """Multiply fp8 values [..., R, C] by the scales of their blocks.

    Args:
        values: The values.
        scales: float32 scales [..., blocks of rows, blocks of columns], or a single one.
        block: Rows and columns of a block. None: blocks of equal size.

    Raises:
        ValueError: The scales do not fit the values.
    """
    wide = values.to(torch.float32)
    if scales.numel() == 1:
        return wide * scales.reshape(())
    for axis in (-2, -1):
        size, count = values.shape[axis], scales.shape[axis]
        each = _block_size(size, count, None if block is None else block[axis])
        scales = scales.repeat_interleave(each, dim=axis).narrow(axis, 0, size)
    return wide.mul_(scales)


def _block_size(size: int, count: int, wanted: int | None) -> int:
    if wanted is not None and -(-size // wanted) == count:
        return wanted
    if size % count:
        raise ValueError(f"{count} scales do not fit an axis of {size} fp8 values")
    return size // count


def dequantised_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return float32 [E, C, R] of packed values [E, R, C / 32, 16] and exponents [E, R, C / 32].

    A byte holds two values, the lower four bits first. A scale is a power of two, stored as its
    exponent plus 127.
    """
    table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)])
    low, high = (blocks & 0x0F).long(), (blocks >> 4).long()
    values = torch.stack((table[low], table[high]), dim=-1).flatten(-2)
    scaled = torch.ldexp(values, (scales.to(torch.int32) - 127)[..., None])
    return scaled.flatten(-2).transpose(-2, -1).contiguous()


def _scale_values(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two plus 127."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - 127.0).exp2()
    return scales.to(torch.float32)


def dequantised_tensors(
    stored: Mapping[str, StoredTensor], *, block: tuple[int, int] | None
) -> dict[str, Readable]:
    """The tensors that a checkpoint stands for, by name; scales are no tensors of their own.

    Args:
        stored: All tensors of the checkpoint.
        block: Rows and columns of an fp8 block, if the checkpoint's configuration names them.

    Raises:
        ValueError: An fp8 tensor has no scales.
    """
    found: dict[str, Readable] = {}
    used: set[str] = set()
    for name, tensor in stored.items():
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in stored:
            whole = name.removesuffix(_BLOCKS)
            found[whole] = Mxfp4Tensor(tensor, stored[whole + _SCALES])
            used |= {name, whole + _SCALES}
        elif tensor.dtype in _NARROW:
            scale = _scale_of(name, stored)
            found[name] = Fp8Tensor(tensor, stored[scale], block)
            used |= {name, scale, *_activation_scales(name, stored)}
    return found | {name: tensor for name, tensor in stored.items() if name not in used}


def _scale_of(name: str, stored: Mapping[str, StoredTensor]) -> str:
    stem = name.removesuffix("weight")
    candidates = [f"{name}_scale_inv", *(stem + scale for scale in _SCALE_NAMES)]
    for candidate in candidates:
        if candidate in stored and candidate != name:
            return candidate
    raise ValueError(f"{name} is stored in fp8 without scales; looked for {candidates[0]}")


def _activation_scales(name: str, stored: Mapping[str, StoredTensor]) -> list[str]:
    stem = name.removesuffix("weight")
    return [stem + other for other in ("activation_scale", "input_scale") if stem + other in stored]

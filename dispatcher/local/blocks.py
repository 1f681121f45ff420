"""Blocks of memory shared by the ranks of one node, and the pool of blocks that a rank sends from.

A block is an anonymous memory file (memfd). No name is left behind after a crash, the limit of
/dev/shm does not apply, and the memory is freed when the last process that mapped it ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

ALIGN = 64  # bytes: every part of a block starts on a cache line
_LEAST = 1 << 16  # bytes of the smallest block


_numbers = count()
_standing: dict[int, Block] = {}  # live buffers of ``shared_zeros`` by address


class _StandingFile(mmap.mmap):
    """The mapping behind a buffer of ``shared_zeros``.

    The buffer leaves the registry before the memory is unmapped, because another thread may get
    the same address afterwards.
    """

    address = 0

    def __del__(self) -> None:
        block = _standing.pop(self.address, None)
        if block is not None:
            block.close()


@dataclass(eq=False)
class Block:
    """One mapped memory file; ``bytes_N`` is its content, uint8."""

    number: int  # of this process
    fd: int
    size: int
    bytes_N: Tensor
    busy_until: int = 0  # collective that all peers must have ended before the block is rewritten

    def close(self) -> None:
        """Close the file descriptor. The mapping lives as long as a tensor uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def mapped(number: int, fd: int, size: int) -> Block:
    """Map a memory file of ``size`` bytes as a block."""
    return Block(number, fd, size, torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8))


def _memory_file(size: int) -> int:
    fd = os.memfd_create("exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def shared_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a CPU tensor of zeros in shared memory.

    A ``SharedExchange`` sends from such a tensor, and sums into it, without an extra copy. Use this
    function for large buffers that are exchanged often. On systems without memory files the result
    is an ordinary tensor.
    """
    plain = torch.Size(shape).numel() * dtype.itemsize
    if plain == 0 or not hasattr(os, "memfd_create"):
        return torch.zeros(tuple(shape), dtype=dtype)
    size = aligned(plain)
    fd = _memory_file(size)
    file = _StandingFile(fd, size)
    bytes_N = torch.frombuffer(file, dtype=torch.uint8)
    file.address = bytes_N.data_ptr()
    # The registry holds no tensor on the buffer, so it does not keep the memory alive.
    block = Block(next(_numbers), fd, size, torch.empty(0, dtype=torch.uint8))
    _standing[file.address] = block
    return bytes_N[:plain].view(dtype).view(tuple(shape))


def standing(bytes_N: Tensor) -> tuple[Block, int] | None:
    """Return the ``shared_zeros`` buffer that contains these bytes and their offset, or None."""
    address, size = bytes_N.data_ptr(), bytes_N.shape[0]
    for start, block in list(_standing.items()):  # a copy: other threads may remove buffers
        if start <= address and address + size <= start + block.size:
            return block, address - start
    return None


class BlockPool:
    """The blocks that this rank sends from. A block that peers may still read is not reused."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def take(self, size: int, *, ended_everywhere: int) -> Block:
        """Return the smallest free block of at least ``size`` bytes, or a new block.

        Args:
            size: Bytes wanted.
            ended_everywhere: Number of the last collective that every peer has ended.
        """
        fit = [b for b in self.blocks if b.size >= size and b.busy_until <= ended_everywhere]
        return min(fit, key=lambda block: block.size) if fit else self._new(size)

    def _new(self, size: int) -> Block:
        room = max(_LEAST, 1 << (size - 1).bit_length())
        fd = _memory_file(room)
        block = mapped(next(_numbers), fd, room)
        self.blocks.append(block)
        return block

    def close(self) -> None:
        for block in self.blocks:
            block.close()
        self.blocks = []


def aligned(size: int) -> int:
    """Return ``size`` rounded up to a multiple of ``ALIGN``."""
    return -(-size // ALIGN) * ALIGN

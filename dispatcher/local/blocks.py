"""Blocks of memory that the ranks of one machine share, and the pool that a rank sends from.

A block is an anonymous memory file: it has no name that could be left behind, does not count
against the limit of /dev/shm, and goes when the last process that mapped it goes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

ALIGN = 64  # bytes: every part of a block begins on a cache line
_LEAST = 1 << 16  # bytes of the smallest block


_numbers = count()
_standing: dict[int, Block] = {}  # by address: buffers of ``shared_zeros`` that are alive


class _StandingFile(mmap.mmap):
    """The mapping behind a buffer of ``shared_zeros``.

    The registry is told before the memory is unmapped: afterwards another thread may get the same
    address for something else.
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
    busy_until: int = 0  # the exchange that peers must have ended before it may be rewritten

    def close(self) -> None:
        """Give the file descriptor back; the mapping lives as long as a tensor on it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def mapped(number: int, fd: int, size: int) -> Block:
    """The block behind a memory file of ``size`` bytes."""
    return Block(number, fd, size, torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8))


def _memory_file(size: int) -> int:
    fd = os.memfd_create("exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def shared_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor of zeros that ranks of this machine can read from where it lies.

    A ``SharedExchange`` sends from it, and sums into it, without a copy on the way. An ordinary
    tensor where the system has no memory files.
    """
    plain = torch.Size(shape).numel() * dtype.itemsize
    if plain == 0 or not hasattr(os, "memfd_create"):
        return torch.zeros(tuple(shape), dtype=dtype)
    size = aligned(plain)
    fd = _memory_file(size)
    file = _StandingFile(fd, size)
    bytes_N = torch.frombuffer(file, dtype=torch.uint8)
    file.address = bytes_N.data_ptr()
    # The registry must not keep the memory alive: it holds no tensor, and is told of the end.
    block = Block(next(_numbers), fd, size, torch.empty(0, dtype=torch.uint8))
    _standing[file.address] = block
    return bytes_N[:plain].view(dtype).view(tuple(shape))


def standing(bytes_N: Tensor) -> tuple[Block, int] | None:
    """The buffer of ``shared_zeros`` that holds these bytes, and where in it they begin."""
    address, size = bytes_N.data_ptr(), bytes_N.shape[0]
    for start, block in list(_standing.items()):  # another thread's buffer may go meanwhile
        if start <= address and address + size <= start + block.size:
            return block, address - start
    return None


class BlockPool:
    """This rank's blocks. One that peers may still be reading is never handed out again."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def take(self, size: int, *, ended_everywhere: int) -> Block:
        """The smallest block of at least ``size`` bytes that is free, or a new one.

        Args:
            size: Bytes wanted.
            ended_everywhere: Number of the last exchange that every peer has ended.
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
    """``size`` rounded up to whole cache lines."""
    return -(-size // ALIGN) * ALIGN

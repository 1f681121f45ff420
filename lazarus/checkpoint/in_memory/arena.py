"""Shared memory of a node's keeper: slots in anonymous files that die with their last holder.

The segments are memfds: they have no name in any filesystem, so that a SIGKILL of every process
of the node leaves nothing behind. The keeper owns them; trainers of the same user map them through
``/proc/{pid}/fd/{fd}``. EFFECTS.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from lazarus.checkpoint.errors import KeeperUnavailableError

_SEGMENT_BYTES = 64 << 20
_PAGE = 4096
_SLACK = 1.25
NAME_PREFIX = "lazarus-keeper"


@dataclass(frozen=True, slots=True)
class Slot:
    """A range of one segment, exclusively one record's while it is taken."""

    segment: int
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Segment:
    fd: int
    memory: mmap.mmap
    num_bytes: int


class Arena:
    """Hands out slots; grows by segments up to a limit, reuses freed slots of a fitting size."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._segments: dict[int, _Segment] = {}  # numbers are never used again
        self._num_made = 0
        self._free: list[Slot] = []
        self._taken_bytes = 0
        self.peak_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments, free slots included."""
        return sum(s.num_bytes for s in self._segments.values())

    @property
    def taken_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self._taken_bytes

    def take(self, num_bytes: int) -> Slot:
        """A slot of at least ``num_bytes``.

        Raises:
            MemoryError: The limit would be exceeded.
        """
        need = -(-max(num_bytes, 1) // _PAGE) * _PAGE
        fitting = [s for s in self._free if need <= s.num_bytes <= max(_SLACK * need, _PAGE)]
        if not fitting:
            self._grow(need)
            fitting = [s for s in self._free if s.num_bytes == need]
        slot = min(fitting, key=lambda s: (s.num_bytes, s.segment, s.offset))
        self._free.remove(slot)
        self._taken_bytes += slot.num_bytes
        self.peak_bytes = max(self.peak_bytes, self._taken_bytes)
        return slot

    def _grow(self, slot_bytes: int) -> None:
        room = self._limit - self.reserved_bytes
        count = min(max(1, _SEGMENT_BYTES // slot_bytes), room // slot_bytes, 16)
        if count < 1:
            raise MemoryError(
                f"snapshot memory is full: {self.reserved_bytes} of {self._limit} bytes, "
                f"{slot_bytes} more wanted; raise the limit or lower k_snapshot"
            )
        index, size = self._num_made, count * slot_bytes
        self._num_made += 1
        fd = os.memfd_create(f"{NAME_PREFIX}-{index}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self._segments[index] = _Segment(fd=fd, memory=mmap.mmap(fd, size), num_bytes=size)
        self._free += [
            Slot(segment=index, offset=i * slot_bytes, num_bytes=slot_bytes) for i in range(count)
        ]

    def give_back(self, slot: Slot) -> None:
        """Free a slot; its pages stay for the next record of its size."""
        self._free.append(slot)
        self._taken_bytes -= slot.num_bytes

    def discard(self, slot: Slot) -> None:
        """Free a slot that was never filled; its segment goes, if nothing else is in it.

        So a promise that was not kept takes nothing of the limit.
        """
        self.give_back(slot)
        whole = self._segments[slot.segment]
        mine = [free for free in self._free if free.segment == slot.segment]
        if sum(free.num_bytes for free in mine) < whole.num_bytes:
            return
        self._free = [free for free in self._free if free.segment != slot.segment]
        del self._segments[slot.segment]
        with suppress(BufferError):  # somebody looks at it: it goes with the last look
            whole.memory.close()
        os.close(whole.fd)

    def view(self, slot: Slot, num_bytes: int) -> memoryview:
        """The slot's first ``num_bytes`` bytes."""
        memory = memoryview(self._segments[slot.segment].memory)
        return memory[slot.offset : slot.offset + num_bytes]

    def segments(self) -> list[tuple[int, int, int]]:
        """(index, fd, bytes) of every segment, for trainers to map."""
        return [(i, s.fd, s.num_bytes) for i, s in self._segments.items()]


class MappedSegments:
    """A trainer's maps of its keeper's segments."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def add(self, *, pid: int, segments: Mapping[int, tuple[int, int]]) -> None:
        """Map segments not mapped yet.

        Args:
            pid: The keeper's process.
            segments: Segment index to (fd in the keeper, bytes).

        Raises:
            KeeperUnavailableError: The keeper is gone, or its memory may not be opened.
        """
        for index, (fd, num_bytes) in segments.items():
            if index in self._maps:
                continue
            path = f"/proc/{pid}/fd/{fd}"
            try:
                if not os.readlink(path).startswith(f"/memfd:{NAME_PREFIX}-{index}"):
                    raise KeeperUnavailableError(f"{path} is no segment of a keeper")
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise KeeperUnavailableError(f"cannot map {path}: {error}") from error
            try:
                self._maps[index] = mmap.mmap(handle, num_bytes)
            finally:
                os.close(handle)

    def view(self, segment: int, offset: int, num_bytes: int) -> memoryview:
        """A range of one mapped segment."""
        return memoryview(self._maps[segment])[offset : offset + num_bytes]

    def clear(self) -> None:
        """Forget all maps, as after the keeper was replaced; pages go with their last view."""
        self._maps.clear()

"""Shared memory of a node's keeper, divided into slots for snapshots. EFFECTS.

The memory consists of segments, each a memfd. A memfd has no name in any filesystem, so nothing
is left behind when every process of the node gets a SIGKILL. The keeper owns the segments;
trainers of the same user map them through ``/proc/{pid}/fd/{fd}``.
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
    """A byte range of one segment. While a slot is taken, exactly one record uses it."""

    segment: int
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Segment:
    fd: int
    memory: mmap.mmap
    num_bytes: int


class Arena:
    """An allocator of slots: reuses freed slots of a fitting size, else adds a segment.

    Args:
        limit_bytes: Upper bound for the bytes of all segments together.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._segments: dict[int, _Segment] = {}  # an index is never reused
        self._num_made = 0
        self._free: list[Slot] = []
        self._taken_bytes = 0
        self.peak_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments, free slots included."""
        return sum(s.num_bytes for s in self._segments.values())

    def take(self, num_bytes: int) -> Slot:
        """Take a slot of at least ``num_bytes``, rounded up to whole pages.

        Raises:
            MemoryError: A new segment would exceed the limit.
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
        """Free a slot. Its memory stays reserved for the next record of a similar size."""
        self._free.append(slot)
        self._taken_bytes -= slot.num_bytes

    def discard(self, slot: Slot) -> None:
        """Free a slot that was never filled, and its segment if all its slots are now free.

        An abandoned reservation therefore does not count towards the limit any more.
        """
        self.give_back(slot)
        whole = self._segments[slot.segment]
        mine = [free for free in self._free if free.segment == slot.segment]
        if sum(free.num_bytes for free in mine) < whole.num_bytes:
            return
        self._free = [free for free in self._free if free.segment != slot.segment]
        del self._segments[slot.segment]
        with suppress(BufferError):  # a view is still open: unmapped with the last view
            whole.memory.close()
        os.close(whole.fd)

    def view(self, slot: Slot, num_bytes: int) -> memoryview:
        """The slot's first ``num_bytes`` bytes."""
        memory = memoryview(self._segments[slot.segment].memory)
        return memory[slot.offset : slot.offset + num_bytes]

    def segments(self) -> list[tuple[int, int, int]]:
        """Index, file descriptor and size in bytes of every segment, for trainers to map."""
        return [(i, s.fd, s.num_bytes) for i, s in self._segments.items()]


class MappedSegments:
    """A trainer process's memory maps of its keeper's segments."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}

    def add(self, *, pid: int, segments: Mapping[int, tuple[int, int]]) -> None:
        """Map segments not mapped yet.

        Args:
            pid: Process id of the keeper.
            segments: For each segment index, its file descriptor in the keeper and its bytes.

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
        """Forget all maps, for example because the keeper was replaced.

        The memory is unmapped when its last view is released.
        """
        self._maps.clear()

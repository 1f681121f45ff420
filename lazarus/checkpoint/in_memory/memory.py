"""The versions of records that a keeper holds in host memory. No I/O, no threads.

Each record has up to three buffers: a version being written, the newest complete version, and the
version before. The older version stays until the step of the newer one is published and no persist
reads it. A slot is never overwritten while a reader may use it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from lazarus.checkpoint.errors import RefusedError
from lazarus.checkpoint.files.store import RecordKey
from lazarus.checkpoint.format.lineage import Lineage, is_valid
from lazarus.checkpoint.in_memory.arena import Arena, Slot


@dataclass(slots=True, eq=False)
class Version:
    """One record in host memory.

    ``pins`` counts its readers. The slot of a ``retired`` version is freed with the last reader.
    """

    key: RecordKey
    slot: Slot
    num_bytes: int
    checksum: str = ""
    pins: int = 0
    retired: bool = False


@dataclass(slots=True)
class Ticket:
    """The versions reserved for a snapshot in progress, in the order of the reservation."""

    versions: list[Version] = field(default_factory=list)


class KeeperMemory:
    """Complete versions of each expert, stored in an ``Arena``. The caller serialises all calls."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._complete: dict[tuple[int, int], list[Version]] = {}
        self._pruned_generation = -1

    def reserve(self, keys: Sequence[RecordKey], sizes: Sequence[int]) -> Ticket:
        """Reserve slots for all records of one snapshot, or for none.

        Args:
            keys: The records.
            sizes: Bytes of each record, in the order of ``keys``.

        Raises:
            MemoryError: The records do not fit.
        """
        ticket = Ticket()
        try:
            for key, num_bytes in zip(keys, sizes, strict=True):
                slot = self.arena.take(num_bytes)
                ticket.versions.append(Version(key=key, slot=slot, num_bytes=num_bytes))
        except MemoryError:
            self.abandon(ticket)
            raise
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Free the slots of a snapshot that will not be complete."""
        for version in ticket.versions:
            self.arena.give_back(version.slot)
        ticket.versions.clear()

    def withdraw(self, ticket: Ticket) -> None:
        """Free the slots of records that never arrived, and segments that become empty."""
        for version in ticket.versions:
            self.arena.discard(version.slot)
        ticket.versions.clear()

    def view(self, version: Version) -> memoryview:
        """A view of the record's bytes. Pin the version while the view is in use."""
        return self.arena.view(version.slot, version.num_bytes)

    def complete(self, version: Version) -> None:
        """Make a finished record available for recovery, if an expert can be restored from it.

        Dense shards and records with a single part are only needed for a persist. They are retired
        at once, and their slot is freed when the persist unpins them.
        """
        key = version.key
        if key.is_dense or len(key.parts) < 2:
            self.retire(version)
            return
        held = self._complete.setdefault((key.layer, key.expert), [])
        twins = [v for v in held if (v.key.generation, v.key.step) == (key.generation, key.step)]
        for twin in twins:
            held.remove(twin)
            self.retire(twin)
        held.append(version)
        held.sort(key=lambda v: (v.key.step, v.key.generation))
        while len(held) > 2:
            self.retire(held.pop(0))

    def published(self, step: int, *, generation: int) -> None:
        """Retire versions that have a newer version at or before ``step``.

        The controller has journaled all commits up to ``step``. A newer version of an older
        generation replaces another only if ``prune`` has seen the lineage of ``generation``:
        before that, it may hold a step that only its own rank applied.
        """
        for held in self._complete.values():
            while len(held) > 1 and held[1].key.step <= step:
                known = generation in (held[1].key.generation, self._pruned_generation)
                if not known:
                    break
                self.retire(held.pop(0))

    def retire(self, version: Version) -> None:
        """Mark a version as not needed for recovery; free its slot once it has no readers."""
        version.retired = True
        self._free_if_unread(version)

    def pin(self, version: Version) -> None:
        """Count a reader; the slot is not freed before ``unpin``."""
        version.pins += 1

    def unpin(self, version: Version) -> None:
        """Release a reader's pin."""
        version.pins -= 1
        self._free_if_unread(version)

    def _free_if_unread(self, version: Version) -> None:
        if version.retired and version.pins == 0:
            self.arena.give_back(version.slot)

    def find(self, *, layer: int, expert: int, generation: int, step: int) -> Version:
        """The complete version of an expert with exactly this generation and step.

        Raises:
            RefusedError: This keeper does not hold the version.
        """
        for version in self._complete.get((layer, expert), ()):
            if (version.key.generation, version.key.step) == (generation, step):
                return version
        raise RefusedError(f"L{layer}/E{expert} of (g{generation}, t{step}) is not held here")

    def held(self) -> list[Version]:
        """All complete versions, by layer, expert, step."""
        return [v for key in sorted(self._complete) for v in self._complete[key]]

    def prune(self, lineage: Lineage, *, resume_step: int) -> int:
        """Forget versions that are not on the lineage's history; return how many."""
        self._pruned_generation = max((g for g, _ in lineage), default=-1)
        return self._forget(
            [
                v
                for v in self.held()
                if not is_valid(
                    generation=v.key.generation,
                    step=v.key.step,
                    lineage=lineage,
                    resume_step=resume_step,
                )
            ]
        )

    def drop(self, tags: Collection[tuple[int, int, int, int]]) -> int:
        """Forget versions named as (layer, expert, generation, step); return how many."""
        return self._forget([v for v in self.held() if _tag(v.key) in tags])

    def _forget(self, versions: Sequence[Version]) -> int:
        for version in versions:
            self._complete[version.key.layer, version.key.expert].remove(version)
            self.retire(version)
        return len(versions)


def _tag(key: RecordKey) -> tuple[int, int, int, int]:
    return key.layer, key.expert, key.generation, key.step

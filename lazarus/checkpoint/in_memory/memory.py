"""What a keeper holds: complete records by version, and those in the making. No I/O, no threads.

Triple buffering, per record instead of per snapshot: a version being written, a version kept for
recovery, and (while its step is not yet published, or a persist reads it) the one before. A slot
is never overwritten in place while anything may read it.
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
    """One record in host memory. ``pins`` counts the readers; a retired one goes with the last."""

    key: RecordKey
    slot: Slot
    num_bytes: int
    checksum: str = ""
    pins: int = 0
    retired: bool = False


@dataclass(slots=True)
class Ticket:
    """Records of one snapshot in the making, in the order of the reservation."""

    versions: list[Version] = field(default_factory=list)


class KeeperMemory:
    """Versions by expert, slots by arena. The caller serialises all calls."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._complete: dict[tuple[int, int], list[Version]] = {}
        self._pruned_generation = -1

    def reserve(self, keys: Sequence[RecordKey], sizes: Sequence[int]) -> Ticket:
        """Slots for the records of one snapshot, all or none.

        Raises:
            MemoryError: They do not fit.
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
        """``abandon``, of records that never came: what was set aside for them goes too."""
        for version in ticket.versions:
            self.arena.discard(version.slot)
        ticket.versions.clear()

    def view(self, version: Version) -> memoryview:
        """The record's bytes; pin the version while using it."""
        return self.arena.view(version.slot, version.num_bytes)

    def complete(self, version: Version) -> None:
        """Make a record with its checksum available for recovery, if it can serve for one.

        Dense shards and records with one part only exist for a persist: they stay pinned by it
        and go with it.
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
        """Commits up to ``step`` are journaled: versions behind a newer true one may go.

        A version of an older generation counts as true only once that generation's lineage was
        seen by ``prune``: it may hold a step that its rank applied alone.
        """
        for held in self._complete.values():
            while len(held) > 1 and held[1].key.step <= step:
                known = generation in (held[1].key.generation, self._pruned_generation)
                if not known:
                    break
                self.retire(held.pop(0))

    def retire(self, version: Version) -> None:
        """The version is not needed for recovery any more; its slot goes when nobody reads it."""
        version.retired = True
        self._free_if_unread(version)

    def pin(self, version: Version) -> None:
        """Somebody reads the version."""
        version.pins += 1

    def unpin(self, version: Version) -> None:
        """A reader is done."""
        version.pins -= 1
        self._free_if_unread(version)

    def _free_if_unread(self, version: Version) -> None:
        if version.retired and version.pins == 0:
            self.arena.give_back(version.slot)

    def find(self, *, layer: int, expert: int, generation: int, step: int) -> Version:
        """The complete version with exactly this tag.

        Raises:
            RefusedError: It is not held.
        """
        for version in self._complete.get((layer, expert), ()):
            if (version.key.generation, version.key.step) == (generation, step):
                return version
        raise RefusedError(f"L{layer}/E{expert} of (g{generation}, t{step}) is not held here")

    def held(self) -> list[Version]:
        """All complete versions, by layer, expert, step."""
        return [v for key in sorted(self._complete) for v in self._complete[key]]

    def prune(self, lineage: Lineage, *, resume_step: int) -> int:
        """Forget versions that the lineage voids; returns how many."""
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
        """Forget surplus versions, named as (layer, expert, generation, step)."""
        return self._forget([v for v in self.held() if _tag(v.key) in tags])

    def _forget(self, versions: Sequence[Version]) -> int:
        for version in versions:
            self._complete[version.key.layer, version.key.expert].remove(version)
            self.retire(version)
        return len(versions)


def _tag(key: RecordKey) -> tuple[int, int, int, int]:
    return key.layer, key.expert, key.generation, key.step

"""Experts that no rank holds: each future holder fetches the copy chosen for it (rule 27).

The rule is that of docs/protocol.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from lazarus.checkpoint.errors import NoCheckpointError
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.reader import CheckpointReader, StoredExpert, StoredExperts
from lazarus.checkpoint.files.storage import Storage, read_file
from lazarus.checkpoint.files.store import Tag, load_manifest
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.files.verify import newest_usable
from lazarus.checkpoint.format.manifest import FROZEN, Manifest
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.control.messages import Prepare, Restore, SnapshotHeld
from lazarus.control.saving.losses import bad_source_of
from lazarus.errors import (
    BadSourceError,
    CheckpointError,
    FencedError,
    StorageError,
)
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.healing.transfer import TransferRun
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.state.replica import Replica
from placement import Plan

_Found = TypeVar("_Found")


def still_wanted(observer: Observer, ledger: StepLedger, generation: int) -> Callable[[], None]:
    """A function for waits on storage: reports progress, and raises if this rank is fenced."""

    def waiting() -> None:
        observer.progress += 1
        if ledger.fence > generation:
            raise FencedError(generation=generation, fence=ledger.fence)

    return waiting


class PatientReader:
    """Reads from storage for one rank, retrying while storage refuses.

    Args:
        patience_s: How long to retry, and how long a read may make no progress.
        waiting: Called repeatedly while waiting; may raise to give up.
    """

    def __init__(self, *, patience_s: float, waiting: Callable[[], None] = lambda: None) -> None:
        self._for_s = self._stuck_s = patience_s
        self._waiting = waiting
        self._moved = 0

    def __call__(self, storage: Storage, path: str) -> bytes:
        """Read the bytes of a file.

        Raises:
            StorageError: Storage still refuses.
        """
        return self.ask(
            lambda: read_file(storage, path, progress=self._count), place=storage.place(path)
        )

    def ask(self, work: Callable[[], _Found], *, place: str) -> _Found:
        """Run ``work``, which reads from storage, with retries.

        Raises:
            StorageError: Storage still refuses. Later calls do not retry any more.
        """
        try:
            return patiently(
                work,
                for_s=self._for_s,
                stuck_s=self._stuck_s,
                waiting=self._waiting,
                moved=lambda: self._moved,
                place=place,
                operation="read",
            )
        except StorageError:
            self._for_s = 0.0  # storage is down: other files are tried once
            raise

    def _count(self, num_bytes: int) -> None:
        self._moved += num_bytes


def bad_source(problem: CheckpointError, *, name: str, what: str, source: str) -> BadSourceError:
    """An error for the controller that names the bad copy, and whether storage refused the read."""
    refused = problem if isinstance(problem, StorageError) else None
    return BadSourceError(
        name=name,
        what=what,
        source=source,
        reason=str(problem),
        url="" if refused is None else refused.url,
        operation="" if refused is None else refused.operation,
    )


class Fetcher:
    """Fetches the experts that one PREPARE has this rank restore from keepers or storage.

    Attributes:
        versions: Versions read from storage that may differ from those asked for: a file that is
            damaged or cannot be read is replaced by an older one.
    """

    def __init__(
        self,
        order: Prepare,
        replica: Replica,
        *,
        credentials: Credentials,
        tag: Tag,
        read: PatientReader,
        keeper_s: float,
    ) -> None:
        """``keeper_s`` bounds the wait for a keeper to send one record, in seconds."""
        self._order, self._replica, self._keeper_s = order, replica, keeper_s
        self._credentials, self._tag, self._read = credentials, tag, read
        self._readers: dict[CheckpointRef, CheckpointReader] = {}
        self._stored: dict[tuple[str, int], StoredExperts] = {}
        self.versions: list[SnapshotHeld] = []

    def fetch(
        self, plan: Plan, seat: int, into: TransferRun, *, entering: Callable[[], None]
    ) -> None:
        """Stage the experts that this rank is to hold.

        Args:
            plan: The plan of the new generation.
            seat: This rank in the plan.
            into: Where records are staged.
            entering: Called before each expert.

        Raises:
            BadSourceError: A copy cannot be read; the next attempt chooses another copy.
        """
        for restore in self._order.restores:
            if restore.source == "init" or seat not in plan.ranks_of(restore.layer, restore.expert):
                continue
            entering()
            try:
                tensors = self._tensors(restore)
            except CheckpointError as problem:
                place = restore.source.partition(":")[2]
                name = bad_source_of(restore) if restore.detail else place
                what = f"L{restore.layer}/E{restore.expert}"
                raise bad_source(problem, name=name, what=what, source=place) from problem
            record = self._replica.record_of(restore.layer, restore.expert, tensors)
            into.staged[(restore.layer, restore.expert)] = record
            into.bytes_received += record.numel()

    def _tensors(self, restore: Restore) -> Mapping[str, torch.Tensor]:
        kind, _, place = restore.source.partition(":")
        match kind:
            case "storage" if restore.detail:
                url = CheckpointRef.parse(place).url
                return self._older(restore, url, upto=self._order.step)
            case "storage":
                return self._reader(CheckpointRef.parse(place)).expert(*_key(restore))
            case "newest":
                return self._newest(restore, CheckpointRef.parse(place))
        client = KeeperClient(
            place, credentials=self._credentials, tag=self._tag, timeout_s=self._keeper_s
        )
        try:
            _, image = client.fetch(
                layer=restore.layer,
                expert=restore.expert,
                generation=restore.generation,
                step=restore.step,
            )
        finally:
            client.close()
        return tensors_of(image, where=f"L{restore.layer}/E{restore.expert} from {place}")

    def _reader(self, ref: CheckpointRef) -> CheckpointReader:
        if ref not in self._readers:
            manifest = self._read.ask(lambda: load_manifest(ref.url, ref.step), place=str(ref))
            self._readers[ref] = CheckpointReader(ref.url, manifest, read=self._read)
        return self._readers[ref]

    def _newest(self, restore: Restore, ref: CheckpointRef) -> Mapping[str, torch.Tensor]:
        """Read the expert from the checkpoint, or an older version if that is damaged."""
        if restore.step >= ref.step:
            try:
                return self._reader(ref).expert(*_key(restore))
            except CheckpointError:
                pass  # try an older version, which raises if there is none
        return self._older(restore, ref.url, upto=ref.step)

    def _older(self, restore: Restore, url: str, *, upto: int) -> Mapping[str, torch.Tensor]:
        """Read the newest sound version up to the step ``upto``; the same version on every rank."""
        if (url, upto) not in self._stored:
            lineage = [(int(g), int(b)) for g, b in json.loads(self._order.lineage)]
            self._stored[url, upto] = self._read.ask(
                lambda: StoredExperts(url, lineage=lineage, resume_step=upto, read=self._read),
                place=url,
            )
        stored = self._stored[url, upto]
        found = stored.read(restore.layer, restore.expert, upto=restore.step)
        self.versions.append(_version(restore, found))
        return found.tensors


class StoredFrozen:
    """Frozen weights of experts from the checkpoint that a run was resumed from.

    Args:
        ref: The checkpoint.
        reader: Makes a reader of files that gives up when the present generation is over.
    """

    def __init__(self, ref: CheckpointRef, *, reader: Callable[[], PatientReader]) -> None:
        self._ref, self._make = ref, reader
        self._found: Manifest | None = None

    def __call__(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        """The frozen fields of one expert, by name.

        Raises:
            CheckpointError: They cannot be read.
        """
        read = self._make()
        if self._found is None:
            self._found = read.ask(self._manifest, place=str(self._ref))
        reader = CheckpointReader(self._ref.url, self._found, read=read)
        tensors = reader.part(layer, expert, FROZEN)
        return {name.rpartition(f".experts.{expert}.")[2]: t for name, t in tensors.items()}

    def _manifest(self) -> Manifest:
        """The checkpoint's manifest, or a newer one, which names the same frozen weights."""
        try:
            return load_manifest(self._ref.url, self._ref.step)
        except NoCheckpointError:
            return newest_usable(self._ref.url)


def _key(restore: Restore) -> tuple[int, int]:
    return restore.layer, restore.expert


def _version(restore: Restore, found: StoredExpert) -> SnapshotHeld:
    return SnapshotHeld(
        layer=restore.layer,
        expert=restore.expert,
        generation=found.generation,
        step=found.step,
        routed=found.routed,
    )

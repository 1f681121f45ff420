"""Experts without a live replica: each holder fetches the one chosen copy (rule 27). EFFECTS."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.reader import CheckpointReader, StoredExpert, StoredExperts
from lazarus.checkpoint.files.storage import Storage, read_file
from lazarus.checkpoint.files.store import Tag, load_manifest
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.control.messages import Prepare, Restore, SnapshotHeld
from lazarus.control.saving.losses import bad_source_of
from lazarus.errors import BadSourceError, CheckpointError, FencedError, StorageError
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.healing.transfer import TransferRun
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.state.replica import Replica
from placement import Plan

_Found = TypeVar("_Found")


def still_wanted(observer: Observer, ledger: StepLedger, generation: int) -> Callable[[], None]:
    """What a wait for storage calls all the time: this rank is alive, and not fenced."""

    def waiting() -> None:
        observer.progress += 1
        if ledger.fence > generation:
            raise FencedError(generation=generation, fence=ledger.fence)

    return waiting


class PatientReader:
    """Reads from storage for one rank, asking again while it refuses.

    Args:
        patience_s: For how long it asks again, and how long a read may stand still.
        waiting: Called all the time while it waits.
    """

    def __init__(self, *, patience_s: float, waiting: Callable[[], None] = lambda: None) -> None:
        self._for_s = self._stuck_s = patience_s
        self._waiting = waiting
        self._moved = 0

    def __call__(self, storage: Storage, path: str) -> bytes:
        """The bytes of a file."""
        return self.ask(
            lambda: read_file(storage, path, progress=self._count), place=storage.place(path)
        )

    def ask(self, work: Callable[[], _Found], *, place: str) -> _Found:
        """Whatever is to be read from storage.

        Raises:
            StorageError: It still refuses.
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
            self._for_s = 0.0  # what is down is down for all files: each is asked for once
            raise

    def _count(self, num_bytes: int) -> None:
        self._moved += num_bytes


def bad_source(problem: CheckpointError, *, name: str, what: str, source: str) -> BadSourceError:
    """What the controller must hear: which copy is no good, and whether storage refused it."""
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
    """The restores of one PREPARE, for one rank.

    Attributes:
        versions: What came from storage where that may differ from what was asked for: a file that
            is damaged or cannot be read is passed over for an older one.
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
        """``keeper_s`` bounds the wait for a keeper to send one record."""
        self._order, self._replica, self._keeper_s = order, replica, keeper_s
        self._credentials, self._tag, self._read = credentials, tag, read
        self._readers: dict[CheckpointRef, CheckpointReader] = {}
        self._stored: dict[tuple[str, int], StoredExperts] = {}
        self.versions: list[SnapshotHeld] = []

    def fetch(
        self, plan: Plan, seat: int, into: TransferRun, *, entering: Callable[[], None]
    ) -> None:
        """Stage what this seat is to hold; ``entering`` is called before each expert.

        Raises:
            BadSourceError: A copy cannot be read; the next attempt chooses another one.
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
        """As the checkpoint has it, or where that is no good from an older version; and say so."""
        if restore.step >= ref.step:
            try:
                return self._reader(ref).expert(*_key(restore))
            except CheckpointError:
                pass  # an older version may be sound, and says what is wrong if there is none
        return self._older(restore, ref.url, upto=ref.step)

    def _older(self, restore: Restore, url: str, *, upto: int) -> Mapping[str, torch.Tensor]:
        """The newest sound version at a checkpoint or before; the same one on every rank."""
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

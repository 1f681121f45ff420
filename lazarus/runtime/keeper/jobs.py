"""The keeper's background work: sends copies to other nodes and writes files to storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import Any

from lazarus.checkpoint.errors import CheckpointError
from lazarus.checkpoint.files.storage import Probe
from lazarus.checkpoint.files.store import Record, Tag, write_files
from lazarus.checkpoint.format.image import parse_image
from lazarus.checkpoint.in_memory.memory import Version
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.rpc.credentials import Credentials

Report = Callable[[dict[str, Any]], None]
_PENDING_COPIES = 2
_MIN_RATE = 5e6  # bytes/s; a slower copy to another node times out


@dataclass(frozen=True, kw_only=True, slots=True)
class Copying:
    """Images to send, each with its bytes and the addresses of the keepers to send it to."""

    tag: Tag
    records: list[tuple[Version, memoryview, tuple[str, ...]]]
    published_step: int
    report: Report


@dataclass(frozen=True, kw_only=True, slots=True)
class Persisting:
    """Images to write to storage at ``url``, as one rank's share of a checkpoint."""

    tag: Tag
    url: str
    records: list[tuple[Version, memoryview]]
    report: Report


class KeeperWork:
    """One thread that copies and one that persists, each with a bounded queue.

    Before the caller queues work it pins each version: once if it is persisted, and once for each
    address that it is copied to. Each pin is released by ``unpin``, whether the work succeeds,
    fails or is refused.
    """

    def __init__(
        self, *, credentials: Credentials, probe: Probe, unpin: Callable[[Version], None]
    ) -> None:
        self._credentials, self._probe, self._unpin = credentials, probe, unpin
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._persister = ThreadPoolExecutor(1, thread_name_prefix="persist")
        self._copies = BoundedSemaphore(_PENDING_COPIES)
        self._persists = BoundedSemaphore(2)  # one running, one waiting
        self._clients: dict[str, KeeperClient] = {}

    def copy(self, job: Copying) -> None:
        """Queue copies; if two jobs are pending already, report a failure instead."""
        if not self._copies.acquire(blocking=False):
            self._release_copies(job)
            job.report({"kind": "copy", "ok": False, "error": "earlier copies are under way"})
            return
        self._copier.submit(self._copy, job)

    def persist(self, job: Persisting) -> None:
        """Queue a persist; if one runs and one waits already, report a failure instead."""
        if not self._persists.acquire(blocking=False):
            for version, _ in job.records:
                self._unpin(version)
            job.report(_persist_report(job, error="earlier persists are under way"))
            return
        self._persister.submit(self._persist, job)

    def _release_copies(self, job: Copying) -> None:
        for version, _, addresses in job.records:
            for _ in addresses:
                self._unpin(version)

    def _copy(self, job: Copying) -> None:
        start, sent, errors = time.monotonic(), 0, set[str]()
        try:
            for version, view, addresses in job.records:
                for address in addresses:
                    try:
                        self._push(version, view, address, job)
                        sent += version.num_bytes
                    except Exception as error:  # noqa: BLE001 - whatever it was, it is reported
                        errors.add(str(error) or type(error).__name__)
        finally:
            self._release_copies(job)
            self._copies.release()
        step = job.records[0][0].key.step
        job.report(
            {
                "kind": "copy",
                "ok": not errors,
                "step": step,
                "generation": job.tag.generation,
                "bytes": sent,
                "wall_s": time.monotonic() - start,
                "error": "; ".join(sorted(errors)[:3]),
            }
        )

    def _push(self, version: Version, view: memoryview, address: str, job: Copying) -> None:
        client = self._clients.get(address)
        if client is None:
            limit_s = 10.0 + version.num_bytes / _MIN_RATE
            client = KeeperClient(
                address, credentials=self._credentials, tag=job.tag, timeout_s=limit_s
            )
            self._clients[address] = client
        client.retagged(job.tag)
        try:
            client.push(
                version.key, view, checksum=version.checksum, published_step=job.published_step
            )
        except CheckpointError:
            self._clients.pop(address).close()
            raise

    def _persist(self, job: Persisting) -> None:
        start = time.monotonic()
        try:
            records = [
                Record(key=v.key, specs=parse_image(view).specs, chunks=[view])
                for v, view in job.records
            ]
            written = write_files(job.url, records, tag=job.tag, probe=self._probe)
        except Exception as error:  # noqa: BLE001 - a storage backend may raise anything; reported
            job.report(_persist_report(job, error=f"{type(error).__name__}: {error}"))
            return
        finally:
            for version, _ in job.records:
                self._unpin(version)
            self._persists.release()
        report = _persist_report(job, error="") | {
            "files": [item.to_json() for item in written],
            "bytes": sum(item.num_bytes for item in written),
            "wall_s": time.monotonic() - start,
        }
        job.report(report)


def _persist_report(job: Persisting, *, error: str) -> dict[str, Any]:
    step = job.records[0][0].key.step
    return {
        "kind": "persist",
        "ok": not error,
        "step": step,
        "generation": job.tag.generation,
        "error": error,
    }

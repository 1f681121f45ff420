"""Writes checkpoint manifests for the controller, in a thread of its own, and reports each."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lazarus.basics.clock import now_s
from lazarus.basics.threads import OnDeath, spawn
from lazarus.checkpoint.errors import (
    CheckpointError,
    IncompleteCheckpointError,
    NoCheckpointError,
    StorageError,
)
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.storage import redacted
from lazarus.checkpoint.files.store import Tag, commit_manifest, remove_share
from lazarus.checkpoint.files.verify import newest_usable
from lazarus.checkpoint.format.manifest import LayerEntry, Manifest, WrittenFile
from lazarus.control.messages import problem_of
from lazarus.control.ports import DropFiles, ManifestDone, Stored, WriteManifest
from lazarus.errors import LazarusError
from lazarus.runtime.spec import ControllerSpec


class ManifestWriter:
    """Carries out orders in a thread, one after the other.

    Args:
        spec: The controller's spec.
        on_done: Called in that thread with the outcome of each ``WriteManifest``.
        on_death: Called if the thread dies.
    """

    def __init__(
        self,
        spec: ControllerSpec,
        on_done: Callable[[ManifestDone], None],
        *,
        on_death: OnDeath,
    ) -> None:
        self._spec = spec
        self._on_done = on_done
        self._orders: queue.SimpleQueue[WriteManifest | DropFiles | None] = queue.SimpleQueue()
        self._thread = spawn("manifests", self._run, on_death=on_death)

    def order(self, command: WriteManifest | DropFiles) -> None:
        """Queue a manifest to write, or files to delete."""
        self._orders.put(command)

    def close(self) -> None:
        """Carry out the queued orders and end the thread."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (command := self._orders.get()) is not None:
            if isinstance(command, DropFiles):
                remove_share(self._spec.config.checkpoint_url, command.paths)
            else:
                self._on_done(self._done(command))

    def _done(self, command: WriteManifest) -> ManifestDone:
        """Write a manifest and return the outcome.

        A final manifest in the run's own storage is retried for ``timeouts.storage_patience_s``.
        """
        started, url = now_s(), command.url or self._spec.config.checkpoint_url
        patience_s = self._spec.config.timeouts.storage_patience_s
        try:
            manifest, num_bytes, kept = patiently(
                lambda: write_manifest(self._spec, command),
                for_s=patience_s if command.final and not command.url else 0.0,
                stuck_s=patience_s,
                place=redacted(url),
                operation="write the manifest to",
            )
        except Exception as problem:  # noqa: BLE001 - storage may raise anything; it is reported
            with suppress(ValueError, KeyError, TypeError):  # a garbled report names no files
                remove_share(url, _paths(command))
            return self._failed(command, problem)
        return ManifestDone(
            generation=command.generation,
            step=command.step,
            at_s=now_s(),
            final=command.final,
            kind=manifest.kind,
            num_bytes=num_bytes,
            wall_s=float(command.meta["wall_s"]) + now_s() - started,
            stored=stored_of(manifest),
            standing=tuple((m.generation, m.step, m.kind == "full") for m in kept),
        )

    def _failed(self, command: WriteManifest, problem: Exception) -> ManifestDone:
        told = str(problem)
        if not isinstance(problem, LazarusError):
            told = f"{type(problem).__name__}: {problem}"
        refused = None
        if isinstance(problem, StorageError):
            refused = problem_of(problem)
        return ManifestDone(
            generation=command.generation,
            step=command.step,
            at_s=now_s(),
            final=command.final,
            error=(told.splitlines() or [type(problem).__name__])[0],
            problem=refused,
            is_rootless=isinstance(problem, IncompleteCheckpointError) and not command.final,
        )


def _paths(command: WriteManifest) -> list[str]:
    reports = [json.loads(part) for part in command.parts if part]
    return [str(item["path"]) for report in reports for item in report["files"]]


def stored_of(manifest: Manifest) -> tuple[Stored, ...]:
    """The oldest version of each expert in this manifest: what a restore from it yields."""
    found = []
    for layer, experts in enumerate(manifest.experts):
        for expert in range(len(experts)):
            oldest = manifest.oldest(layer, expert)
            found.append(
                Stored(
                    layer=layer,
                    expert=expert,
                    generation=oldest.generation,
                    step=oldest.step,
                    routed=oldest.routed,
                )
            )
    return tuple(found)


def write_manifest(
    spec: ControllerSpec, command: WriteManifest
) -> tuple[Manifest, int, tuple[Manifest, ...]]:
    """Commit a checkpoint by writing its manifest, then delete old checkpoints.

    Returns:
        The manifest, the bytes written for the checkpoint, and all manifests that remain.

    Raises:
        IncompleteCheckpointError: The checkpoint needs parts of an older one, and no older one is
            usable.
        CheckpointError: A rank's share is missing or damaged.
    """
    reports = [json.loads(part) for part in command.parts if part]
    head = _head(reports)
    files = [WrittenFile.from_json(item) for report in reports for item in report["files"]]
    lineage = [(int(g), int(b)) for g, b in command.meta["lineage"]]
    config = spec.config
    url, lives = command.url or config.checkpoint_url, spec.lives or (config.run_id,)
    previous = None
    if not command.final:
        with suppress(NoCheckpointError):
            previous = newest_usable(url, lineage=lineage, lives=lives)
    manifest = commit_manifest(
        url,
        files,
        tag=Tag(job=config.run_id, term=int(command.meta["term"]), generation=command.generation),
        step=command.step,
        layers=[LayerEntry.from_json(entry) for entry in head["layers"]],
        dense_names=head["dense_names"],
        frozen_names=head.get("frozen_names", ()),
        lineage=lineage,
        meta={
            "run": config.run_id,
            "seed": config.seed,
            "config": spec.decisive,
            "lives": list(lives),
            "scalars": head["scalars"],
            "history": head["history"],
            "routed": head["routed"],
            "step": command.step,
            "plt": command.meta["plt"],
            **({"tied": head["tied"]} if head.get("tied") else {}),
            **{key: head[key] for key in ("source", "adapters") if head.get(key)},
        },
        previous=previous,
        lives=lives,
    )
    num_bytes = sum(file.num_bytes for file in files)
    try:
        kept = retain(url, keep=spec.keep_checkpoints, lineage=lineage, lives=lives)
    except StorageError:  # the checkpoint is committed; the next call deletes the old ones
        return manifest, num_bytes, (manifest,)
    return manifest, num_bytes, kept.manifests


def _head(reports: list[dict[str, Any]]) -> dict[str, Any]:
    for report in reports:
        head = report.get("head", report)
        if "layers" in head:
            found: dict[str, Any] = head
            return found
    raise CheckpointError("no rank reported what the checkpoint must contain")

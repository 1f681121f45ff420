"""Writes manifests for the controller, off its own thread, and reports each."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from typing import Any

from lazarus.checkpoint.errors import CheckpointError
from lazarus.checkpoint.manifest import LayerEntry, Manifest, WrittenFile
from lazarus.checkpoint.retention import retain
from lazarus.checkpoint.store import Tag, commit_manifest
from lazarus.checkpoint.verify import newest_usable
from lazarus.clock import now_s
from lazarus.control.ports import ManifestDone, Stored, WriteManifest
from lazarus.runtime.spec import ControllerSpec
from lazarus.runtime.threads import OnDeath, spawn


class ManifestWriter:
    """One thread; orders in, ``ManifestDone`` events out, in order."""

    def __init__(
        self,
        spec: ControllerSpec,
        on_done: Callable[[ManifestDone], None],
        *,
        on_death: OnDeath,
    ) -> None:
        self._spec = spec
        self._on_done = on_done
        self._orders: queue.SimpleQueue[WriteManifest | None] = queue.SimpleQueue()
        self._thread = spawn("manifests", self._run, on_death=on_death)

    def order(self, command: WriteManifest) -> None:
        self._orders.put(command)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (command := self._orders.get()) is not None:
            self._on_done(self._done(command))

    def _done(self, command: WriteManifest) -> ManifestDone:
        started = now_s()
        try:
            manifest, num_bytes, kept = write_manifest(self._spec, command)
        except Exception as problem:  # noqa: BLE001 - whatever storage or a share may bring
            return ManifestDone(
                generation=command.generation,
                step=command.step,
                at_s=now_s(),
                final=command.final,
                error=f"{type(problem).__name__}: {problem}".splitlines()[0],
            )
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


def stored_of(manifest: Manifest) -> tuple[Stored, ...]:
    """The version of every expert that a restore from this manifest gives."""
    found = []
    for layer, experts in enumerate(manifest.experts):
        for expert, versions in enumerate(experts):
            oldest = min(versions.values(), key=lambda version: version.step)
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
    """Make a checkpoint true, then let old ones go.

    Returns:
        Its manifest, the bytes written for it, and all manifests that stand now.

    Raises:
        CheckpointError: A share is missing or damaged.
    """
    reports = [json.loads(part) for part in command.parts if part]
    head = _head(reports)
    files = [WrittenFile.from_json(item) for report in reports for item in report["files"]]
    lineage = [(int(g), int(b)) for g, b in command.meta["lineage"]]
    try:
        previous = newest_usable(spec.checkpoint_url, lineage=lineage)
    except CheckpointError:
        previous = None
    manifest = commit_manifest(
        spec.checkpoint_url,
        files,
        tag=Tag(job=spec.run_id, term=int(command.meta["term"]), generation=command.generation),
        step=command.step,
        layers=[LayerEntry.from_json(entry) for entry in head["layers"]],
        dense_names=head["dense_names"],
        lineage=lineage,
        meta={
            **spec.checkpoint,
            "scalars": head["scalars"],
            "history": head["history"],
            "routed": head["routed"],
            "step": command.step,
            "plt": command.meta["plt"],
        },
        previous=None if command.final else previous,
    )
    kept = retain(spec.checkpoint_url, keep=spec.keep_checkpoints, lineage=lineage)
    return manifest, sum(file.num_bytes for file in files), kept.manifests


def _head(reports: list[dict[str, Any]]) -> dict[str, Any]:
    for report in reports:
        head = report.get("head", report)
        if "layers" in head:
            found: dict[str, Any] = head
            return found
    raise CheckpointError("no rank reported what the checkpoint must contain")

"""Delete old checkpoints. Files that a kept checkpoint points to are never deleted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lazarus.checkpoint.files.storage import (
    Probe,
    delete_empty_folder,
    delete_file,
    list_folder,
    no_probe,
    open_storage,
)
from lazarus.checkpoint.files.store import Found, damaged_sizes, find_checkpoints, writer_of
from lazarus.checkpoint.format.manifest import Manifest, manifest_path, step_of_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Retained:
    """The result of ``retain``: steps kept and removed, kept manifests, paths of deleted files."""

    kept: tuple[int, ...]
    manifests: tuple[Manifest, ...] = ()
    removed: tuple[int, ...]
    deleted_files: tuple[str, ...]


def retain(
    url: str,
    *,
    keep: int,
    lineage: Sequence[tuple[int, int]] | None = None,
    lives: Collection[str] | None = None,
    probe: Probe = no_probe,
) -> Retained:
    """Keep the newest ``keep`` usable checkpoints and every file they point to; delete the rest.

    Checkpoints of other runs at this URL are neither counted nor deleted.

    Only folders before the newest usable step change: later ones, and that one, may hold files of
    a checkpoint in progress. If no checkpoint is usable, nothing is deleted. Manifests are deleted
    before their files, so a process killed half-way leaves no manifest without its files; the
    next call deletes the remaining files.

    Args:
        url: Root of the checkpoints.
        keep: How many usable checkpoints to keep, >= 1.
        lineage: The run's history; None takes the one recorded in the manifests.
        lives: Ids of this run and of the runs that it continues; None: all files are this run's.
        probe: Called with ``retention.start``, ``.manifest_deleted``, ``.file_deleted``, ``.done``.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint must stay")
    probe("retention.start")
    storage, everything = open_storage(url), find_checkpoints(url)
    found = everything.of_lives(lives)
    usable = [m for m in found.on_lineage(lineage) if not damaged_sizes(storage, m)]
    kept = usable[-keep:]
    if not kept:
        return Retained(kept=(), removed=(), deleted_files=())
    strangers = [m for m in everything.manifests if m not in found.manifests]
    needed = {path for m in (*kept, *strangers) for path in m.files}
    needed |= {manifest_path(m.step) for m in strangers}
    removed = _removable(found, kept)
    for old in removed:
        delete_file(storage, manifest_path(old))
        probe("retention.manifest_deleted")
    kept_steps, newest = {m.step for m in kept}, kept[-1].step
    deleted: list[str] = []
    for name, is_folder in list_folder(storage):
        step = step_of_folder(name)
        if not is_folder or step is None or step >= newest:
            continue
        for inner, is_inner_folder in list_folder(storage, name):
            path = f"{name}/{inner}"
            own = path == manifest_path(step) and step in kept_steps
            if own or is_inner_folder or path in needed or not _is_ours(inner, lives):
                continue
            delete_file(storage, path)
            deleted.append(path)
            probe("retention.file_deleted")
        delete_empty_folder(storage, name)
    probe("retention.done")
    return Retained(
        kept=tuple(sorted(kept_steps)),
        manifests=tuple(kept),
        removed=removed,
        deleted_files=tuple(deleted),
    )


def _removable(found: Found, kept: Sequence[Manifest]) -> tuple[int, ...]:
    steps = {m.step for m in found.manifests} - {m.step for m in kept}
    return tuple(sorted(s for s in steps if s < kept[-1].step))


def sweep(url: str, *, runs: Collection[str]) -> tuple[str, ...]:
    """Delete files of ended runs that no manifest names.

    A killed writer leaves temporary files, or files of a checkpoint that was never committed. The
    caller must be sure that no process of these runs lives, and that no other run is writing at
    this URL.

    Returns:
        Paths of the deleted files; none if any manifest is unreadable.
    """
    storage, found = open_storage(url), find_checkpoints(url)
    if found.unreadable:  # the files that such a manifest needs are not known
        return ()
    needed = {path for m in found.manifests for path in m.files}
    deleted: list[str] = []
    for name, is_folder in list_folder(storage):
        if not is_folder and name.startswith(tuple(f"probe-{run}-" for run in runs)):
            delete_file(storage, name)
            deleted.append(name)
        if not is_folder or step_of_folder(name) is None:
            continue
        for inner, is_inner_folder in list_folder(storage, name):
            path = f"{name}/{inner}"
            half_written = inner.startswith("manifest.json.") and inner.endswith(".tmp")
            theirs = half_written or writer_of(inner) in runs
            if theirs and not is_inner_folder and path not in needed:
                delete_file(storage, path)
                deleted.append(path)
        delete_empty_folder(storage, name)
    return tuple(deleted)


def _is_ours(name: str, lives: Collection[str] | None) -> bool:
    """Whether one of these runs wrote a file, by its name. Files of the user are kept."""
    if lives is not None:
        return writer_of(name) in lives
    stem, extension, _ = name.partition(".safetensors")
    half_written = name.startswith("manifest.json.") and name.endswith(".tmp")
    return half_written or (bool(extension) and stem.startswith(("dense-", "L")))

"""Verify checkpoints by recomputing the checksums of all files. EFFECTS (reads only)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lazarus.basics.careful import NotAFileError
from lazarus.checkpoint.errors import NoCheckpointError, StorageError, UnknownFormatError
from lazarus.checkpoint.files.storage import Storage, hash_file, list_folder, open_storage, redacted
from lazarus.checkpoint.files.store import damaged_sizes, find_checkpoints
from lazarus.checkpoint.format.manifest import Manifest, manifest_path, step_of_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Outcome of a verification; everything is sound if ``bad`` is empty.

    ``bad`` holds (file, problem) pairs, ``usable`` the steps without problems, ``superseded`` the
    steps that are not on the lineage, ``foreign`` the files that no manifest names (left over by
    a killed writer, or not written by Lazarus). Foreign files are harmless.
    """

    checkpoints: int
    files: int
    num_bytes: int
    bad: tuple[tuple[str, str], ...]
    usable: tuple[int, ...]
    superseded: tuple[int, ...]
    foreign: tuple[str, ...]


def damaged_files(storage: Storage, manifest: Manifest) -> tuple[str, ...]:
    """Files whose content does not match the manifest, each as one sentence."""
    checks = ((path, file_problem(storage, path, manifest)) for path in manifest.files)
    return tuple(f"{path} {problem}" for path, problem in checks if problem)


def file_problem(storage: Storage, path: str, manifest: Manifest) -> str | None:
    """Compare one file with the manifest; return the problem, or None if there is none."""
    entry = manifest.files[path]
    try:
        num_bytes, sha256 = hash_file(storage, path)
    except FileNotFoundError:
        return "is missing"
    except StorageError as problem:
        if isinstance(problem.__cause__, NotAFileError):
            return str(problem.reason)
        return f"cannot be read: {problem.reason}"
    if num_bytes != entry.num_bytes:
        return f"has {num_bytes} bytes, not {entry.num_bytes} (truncated or replaced)"
    return None if sha256 == entry.sha256 else "sha256 differs (flipped or replaced)"


def verify(url: str) -> Verification:
    """Read every file of every checkpoint once and compare it with its checksum."""
    storage, found = open_storage(url), find_checkpoints(url)
    bad: dict[str, str] = {}
    for step, error in found.unreadable:
        kind = "unknown format" if isinstance(error, UnknownFormatError) else "unreadable"
        bad[manifest_path(step)] = f"{kind}: {error}"
    checked: dict[str, tuple[str, str | None]] = {}
    usable: list[int] = []
    for manifest in found.manifests:
        whole = True
        for path, entry in manifest.files.items():
            if path not in checked or checked[path][0] != entry.sha256:
                checked[path] = (entry.sha256, file_problem(storage, path, manifest))
            if problem := checked[path][1]:
                bad[path] = problem
                whole = False
        if missing := manifest.missing():
            bad[manifest_path(manifest.step)] = f"lacks {missing[0]}"
            whole = False
        if whole:
            usable.append(manifest.step)
    true_steps = {m.step for m in found.on_lineage()}
    return Verification(
        checkpoints=len(found.manifests) + len(found.unreadable),
        files=len(checked),
        num_bytes=sum(
            {p: e.num_bytes for m in found.manifests for p, e in m.files.items()}.values()
        ),
        bad=tuple(sorted(bad.items())),
        usable=tuple(s for s in usable if s in true_steps),
        superseded=tuple(m.step for m in found.manifests if m.step not in true_steps),
        foreign=_foreign(storage, set(checked)),
    )


def newest_usable(
    url: str,
    *,
    lineage: Sequence[tuple[int, int]] | None = None,
    check: str = "sizes",
    lives: Collection[str] | None = None,
) -> Manifest:
    """The newest checkpoint that is on the lineage and has all its files.

    Args:
        url: Root of the checkpoints.
        lineage: History known from a journal; None takes the one recorded in the manifests.
        check: ``sizes`` compares the size of every file, ``sha256`` reads every file.
        lives: Ids of the runs whose checkpoints count; None for all runs.

    Raises:
        NoCheckpointError: No checkpoint is usable; the message says what is wrong with each.
    """
    storage, found = open_storage(url), find_checkpoints(url).of_lives(lives)
    reasons = [str(error) for _, error in found.unreadable]
    checker = {"sizes": damaged_sizes, "sha256": damaged_files}[check]
    for manifest in reversed(found.on_lineage(lineage)):
        problems = checker(storage, manifest)
        if not problems:
            return manifest
        reasons.append(problems[0])
    what = "; ".join(reasons[:4]) if reasons else "no checkpoint folder with a manifest"
    raise NoCheckpointError(f"no usable checkpoint at {redacted(url)}: {what}")


def _foreign(storage: Storage, named: set[str]) -> tuple[str, ...]:
    found = []
    for name, is_folder in list_folder(storage):
        step = step_of_folder(name)
        if not is_folder or step is None:
            found.append(name)
            continue
        paths = (f"{name}/{inner}" for inner, _ in list_folder(storage, name))
        found += [p for p in paths if p not in named and p != manifest_path(step)]
    return tuple(found)

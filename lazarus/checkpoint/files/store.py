"""Write checkpoints at a URL: data files, then the manifest; and find them. EFFECTS.

First the data files are written under unique names, then the manifest by atomic rename, and only
then may older files be deleted; each stage is durable before the next. A process killed at any
point leaves the previous checkpoint intact. Readers trust manifests and their checksums, never a
folder listing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lazarus.basics.careful import NotAFileError
from lazarus.checkpoint.errors import (
    CheckpointError,
    DamagedError,
    ForeignCheckpointError,
    NoCheckpointError,
)
from lazarus.checkpoint.files.storage import (
    Buffer,
    Probe,
    Storage,
    delete_empty_folder,
    delete_file,
    file_size,
    folder_sizes,
    list_folder,
    no_probe,
    no_progress,
    open_storage,
    read_file,
    redacted,
    sync_folders,
    write_file,
)
from lazarus.checkpoint.format.image import ImageLayout, TensorSpec, layout_image
from lazarus.checkpoint.format.lineage import is_valid
from lazarus.checkpoint.format.manifest import (
    LayerEntry,
    Manifest,
    WrittenFile,
    manifest_path,
    merged,
    step_folder,
    step_of_folder,
)
from lazarus.checkpoint.format.manifest_text import from_text, to_text

MAX_MANIFEST_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """The run, controller term and generation of a writer; part of every file name."""

    job: str
    term: int
    generation: int

    def __str__(self) -> str:
        return f"{self.job}-{self.term}-{self.generation}"


_WRITER = re.compile(
    r"(?:dense-\d+|L\d+-E\d+(?:\.[wof])?)\.(?P<job>.+?)(?:-full)?-\d+-\d+-[0-9a-f]+\.safetensors"
)


def writer_of(name: str) -> str | None:
    """Id of the run that wrote a data file (or a temporary one), by its name; None if foreign."""
    found = _WRITER.match(name)
    return None if found is None else found["job"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordKey:
    """Identity of a record: an expert (``layer``, ``expert``), or a shard of the dense state.

    ``parts`` are the expert's parts in the record, ``routed`` is its cumulative count of routed
    copies at ``step``. A dense shard has layer -1 and its index as ``expert``.
    """

    layer: int
    expert: int
    step: int
    generation: int
    routed: int = 0
    parts: tuple[str, ...] = ("weights", "optimizer")

    @property
    def is_dense(self) -> bool:
        """Whether this is a shard of the dense state."""
        return self.layer < 0

    def file_name(self, tag: Tag, attempt: str) -> str:
        """Name of the record's file in the step's folder, unique to the writing attempt."""
        if self.is_dense:
            return f"dense-{self.expert:05d}.{tag}-{attempt}.safetensors"
        part = "" if len(self.parts) == 2 else f".{self.parts[0][0]}"
        return f"L{self.layer:02d}-E{self.expert:03d}{part}.{tag}-{attempt}.safetensors"

    def metadata(self, tag: Tag) -> dict[str, str]:
        """Metadata stored in the image, which identifies the file without its path."""
        return {
            "lazarus": "1",
            "job": tag.job,
            "term": str(tag.term),
            "generation": str(self.generation),
            "step": str(self.step),
            "layer": str(self.layer),
            "expert": str(self.expert),
            "routed": str(self.routed),
            "parts": ",".join(self.parts),
        }

    def layout(self, specs: Sequence[TensorSpec], tag: Tag) -> ImageLayout:
        """The layout of this record's image."""
        return layout_image(specs, metadata=self.metadata(tag))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A record ready to be written: key, tensor specs, and the image's bytes in chunks."""

    key: RecordKey
    specs: tuple[TensorSpec, ...]
    chunks: Sequence[Buffer]


def write_files(
    url: str,
    records: Iterable[Record],
    *,
    tag: Tag,
    probe: Probe = no_probe,
    progress: Callable[[int], None] = no_progress,
) -> tuple[WrittenFile, ...]:
    """Write one writer's share of a checkpoint. The files are durable when the call returns.

    Every call uses new file names, so a second checkpoint of a step (the last one of a run, or one
    on request) never changes the files of the first. The files become part of a checkpoint with
    ``commit_manifest``. If a file cannot be written, the files written before are deleted.
    Probe labels: ``file.open``, ``file.written``, ``file.synced``, ``file.renamed``.

    Raises:
        StorageError: A file cannot be written.
    """
    storage, written = open_storage(url), list[WrittenFile]()
    try:
        _write_each(storage, records, into=written, tag=tag, probe=probe, progress=progress)
        sync_folders(storage, [item.path for item in written])
    except CheckpointError:
        remove_share(url, [item.path for item in written])
        raise
    return tuple(written)


def remove_share(url: str, paths: Iterable[str]) -> None:
    """Delete files that no manifest names or will name. Errors of storage are ignored."""
    gone = tuple(paths)
    with suppress(CheckpointError):
        storage = open_storage(url)
        for path in gone:
            with suppress(CheckpointError):
                delete_file(storage, path)
        for folder in sorted({path.rpartition("/")[0] for path in gone}):
            delete_empty_folder(storage, folder)


def _write_each(
    storage: Storage,
    records: Iterable[Record],
    *,
    into: list[WrittenFile],
    tag: Tag,
    probe: Probe,
    progress: Callable[[int], None],
) -> None:
    attempt = os.urandom(4).hex()
    for record in records:
        key = record.key
        path = f"{step_folder(key.step)}/{key.file_name(tag, attempt)}"
        num_bytes, sha256 = write_file(
            storage,
            path,
            record.chunks,
            probe=probe,
            kind="file",
            sync_folder=False,
            progress=progress,
        )
        into.append(
            WrittenFile(
                path=path,
                num_bytes=num_bytes,
                sha256=sha256,
                kind="dense" if key.is_dense else "expert",
                step=key.step,
                generation=key.generation,
                layer=key.layer,
                expert=key.expert,
                routed=key.routed,
                parts=() if key.is_dense else key.parts,
                specs=record.specs,
            )
        )


def commit_manifest(
    url: str,
    written: Sequence[WrittenFile],
    *,
    tag: Tag,
    step: int,
    layers: Sequence[LayerEntry],
    dense_names: Collection[str],
    lineage: Sequence[tuple[int, int]],
    meta: Mapping[str, Any],
    previous: Manifest | None,
    frozen_names: Collection[str] = (),
    lives: Collection[str] | None = None,
    probe: Probe = no_probe,
) -> Manifest:
    """Commit a checkpoint: check the sizes of its files, then write its manifest atomically.

    Args:
        url: Root of the checkpoints.
        written: Reports of all writers for this step.
        tag: Run, term and generation of the checkpoint.
        step: Committed, published step.
        layers: MoE layers in order, with the tensors each expert must have.
        dense_names: Every dense tensor the checkpoint must have.
        lineage: Pairs (generation, step) of every RESUME so far.
        meta: JSON-able state: config digest, sampler seed, load history, counts.
        previous: Newest valid manifest; None for the first checkpoint, which must be full.
        frozen_names: Dense tensors that may be in files of ``previous``, since they do not change.
        lives: Ids of this run and of the runs that it continues; None: all files are this run's.
        probe: Called with ``manifest.open``, ``.written``, ``.synced``, ``.renamed``.

    Returns:
        The manifest of this step that is now on storage. If storage holds an
        undamaged checkpoint of this step and generation with more freshly saved experts, that one
        is kept (a periodic save may end after a full one).

    Raises:
        IncompleteCheckpointError: There is no file for an expert or a dense tensor.
        DamagedError: A file of the checkpoint is missing or has another size.
        ForeignCheckpointError: Another run's checkpoint of this step is at the URL.
    """
    base = Manifest(
        job=tag.job,
        term=tag.term,
        generation=tag.generation,
        step=step,
        kind="",
        created_at_s=time.time(),
        lineage=tuple((g, b) for g, b in lineage),
        layers=tuple(layers),
        dense={},
        experts=(),
        files={},
        meta=meta,
    )
    manifest = merged(
        base, written, previous=previous, dense_names=dense_names, frozen_names=frozen_names
    )
    storage = open_storage(url)
    if bad := damaged_sizes(storage, manifest):
        raise DamagedError(f"step {step} is not committed: {bad[0]}")
    standing = _standing(storage, manifest, lives=lives, where=redacted(url))
    if standing is not None:
        return standing
    text = to_text(manifest).encode()
    write_file(storage, manifest_path(step), [text], probe=probe, kind="manifest", is_new=False)
    return manifest


def _standing(
    storage: Storage, new: Manifest, *, lives: Collection[str] | None, where: str
) -> Manifest | None:
    """The stored checkpoint of the same step, if ``new`` must not replace it."""
    try:
        old = _load(storage, new.step, where="")
    except CheckpointError:
        return None
    if lives is not None and not lives_of(old) & set(lives):
        raise ForeignCheckpointError(where=where, step=old.step, job=old.job)
    same = (old.term, old.generation) == (new.term, new.generation)
    fresher = old.fresh_experts() > new.fresh_experts()
    return old if same and fresher and not damaged_sizes(storage, old) else None


def lives_of(manifest: Manifest) -> frozenset[str]:
    """Ids of the run that wrote a checkpoint and of the runs that it continued."""
    lives = manifest.meta.get("lives")
    return frozenset(map(str, lives if isinstance(lives, list | tuple) else ())) | {manifest.job}


def damaged_sizes(storage: Storage, manifest: Manifest) -> tuple[str, ...]:
    """Files that are missing or have another size than in the manifest, each as one sentence."""
    problems = []
    folders = {path.rpartition("/")[0] for path in manifest.files}
    sizes = {path: size for f in folders for path, size in folder_sizes(storage, f).items()}
    for path, entry in manifest.files.items():
        size = sizes.get(path)
        if size is None:
            problems.append(f"{path} is missing")
        elif size != entry.num_bytes:
            problems.append(f"{path} has {size} bytes, not {entry.num_bytes} (truncated)")
    return tuple(problems)


def load_manifest(url: str, step: int) -> Manifest:
    """The manifest of one step.

    Raises:
        NoCheckpointError: There is no manifest of this step.
        UnknownFormatError, DamagedError: The manifest cannot be read.
    """
    return _load(open_storage(url), step, where=redacted(url))


def _load(storage: Storage, step: int, *, where: str) -> Manifest:
    path = manifest_path(step)
    size = file_size(storage, path)
    if size is None:
        raise NoCheckpointError(f"{where} has no checkpoint of step {step}")
    if size > MAX_MANIFEST_BYTES:
        raise DamagedError(f"{path} has {size} bytes; no manifest is that large")
    try:
        manifest = from_text(read_file(storage, path), path=path)
    except NotAFileError as error:
        raise DamagedError(f"{path} {error.strerror}") from error
    if manifest.step != step:
        raise DamagedError(f"{path} is the manifest of step {manifest.step} (moved)")
    for name in manifest.files:
        storage.full(name)
    return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The manifests at a URL: readable ones by ascending step, and errors of unreadable ones."""

    manifests: tuple[Manifest, ...]
    unreadable: tuple[tuple[int, CheckpointError], ...]

    def of_lives(self, lives: Collection[str] | None) -> Found:
        """The same with only the readable manifests of these runs; None: of all runs."""
        if lives is None:
            return self
        own = tuple(m for m in self.manifests if m.job in lives)
        return Found(manifests=own, unreadable=self.unreadable)

    def lineage(self) -> tuple[tuple[int, int], ...]:
        """The lineage recorded in the manifest with the newest (generation, term, step)."""
        if not self.manifests:
            return ()
        newest = max(self.manifests, key=lambda m: (m.generation, m.term, m.step))
        return newest.lineage

    def next_generation(self) -> int:
        """A generation above all in these manifests. A resumed run starts with this number."""
        return 1 + max(
            (max([m.generation, *(g for g, _ in m.lineage)]) for m in self.manifests), default=0
        )

    def on_lineage(self, lineage: Sequence[tuple[int, int]] | None = None) -> tuple[Manifest, ...]:
        """Manifests on ``lineage``, by ascending step; None: on the recorded ``lineage()``."""
        pairs = self.lineage() if lineage is None else tuple(lineage)
        return tuple(
            m
            for m in self.manifests
            if is_valid(generation=m.generation, step=m.step, lineage=pairs, resume_step=m.step)
        )


def find_checkpoints(url: str) -> Found:
    """Read every manifest at a URL. Folders without a manifest and foreign folders are ignored."""
    storage = open_storage(url)
    manifests: list[Manifest] = []
    unreadable: list[tuple[int, CheckpointError]] = []
    for name, is_folder in list_folder(storage):
        step = step_of_folder(name)
        if step is None or not is_folder:
            continue
        try:
            manifests.append(_load(storage, step, where=redacted(url)))
        except NoCheckpointError:
            continue
        except CheckpointError as error:
            unreadable.append((step, error))
    manifests.sort(key=lambda m: m.step)
    return Found(manifests=tuple(manifests), unreadable=tuple(unreadable))

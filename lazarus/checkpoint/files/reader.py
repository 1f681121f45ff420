"""Read checkpoints: whole, one expert at a time, or as a lazy state dict. EFFECTS.

Every file is compared with its checksum before its tensors are used.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lazarus.checkpoint.errors import (
    DamagedError,
    IncompleteCheckpointError,
    NoCheckpointError,
    StorageError,
)
from lazarus.checkpoint.files.ranges import TensorFile
from lazarus.checkpoint.files.storage import Storage, open_storage, read_file
from lazarus.checkpoint.files.store import find_checkpoints, load_manifest
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.files.verify import file_problem, newest_usable
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.manifest import (
    ExpertVersion,
    LayerEntry,
    Manifest,
    TensorEntry,
    expert_name,
)

ReadFile = Callable[[Storage, str], bytes]
_MODEL = "model."
_CACHED_FILES = 4
_WHOLE_BYTES = 8 << 20  # smaller files are read whole and cached


class CheckpointReader:
    """Reads the tensors of one checkpoint. At most four files are cached in memory.

    ``read`` returns a file's bytes; a caller may pass a function that retries failed reads.
    """

    def __init__(self, url: str, manifest: Manifest, *, read: ReadFile = read_file) -> None:
        self.manifest = manifest
        self._read = read
        self._storage: Storage = open_storage(url)
        self._cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._large: dict[str, TensorFile] = {}

    def file(self, path: str) -> dict[str, Tensor]:
        """All tensors of one file, after checking the file's sha256.

        Raises:
            DamagedError: The file is missing or does not match the manifest.
        """
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        entry = self.manifest.files[path]
        try:
            data = self._read(self._storage, path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path} is missing") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamagedError(f"{path} sha256 differs (flipped or truncated)")
        self._cache[path] = tensors_of(data, where=path)
        while len(self._cache) > _CACHED_FILES:
            self._cache.popitem(last=False)
        return self._cache[path]

    def stored(self, path: str, name: str) -> Tensor:
        """One tensor of a file. A large file is checked once, and only this tensor is kept.

        Raises:
            DamagedError: The file is missing or does not match the manifest.
        """
        if self.manifest.files[path].num_bytes <= _WHOLE_BYTES:
            return self.file(path)[name]
        if path not in self._large:
            if problem := file_problem(self._storage, path, self.manifest):
                raise DamagedError(f"{path} {problem}")
            self._large[path] = TensorFile(self._storage, path)
        return self._large[path].tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One dense tensor by its global name."""
        return self.file(self.manifest.dense[name].file)[name]

    def dense(self) -> dict[str, Tensor]:
        """The whole dense state by global name."""
        names = sorted(self.manifest.dense, key=lambda n: self.manifest.dense[n].file)
        return {name: self.tensor(name) for name in names}

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert's tensors, weights and optimizer state, by global name.

        Raises:
            DamagedError: A file of the expert is damaged, or lacks a tensor.
        """
        found: dict[str, Tensor] = {}
        for part in self.manifest.layers[layer].parts():
            found |= self.part(layer, expert, part)
        return found

    def part(self, layer: int, expert: int, part: str) -> dict[str, Tensor]:
        """One part of one expert, by global name.

        Raises:
            DamagedError: The part's file is damaged, or lacks a tensor.
        """
        version = self.manifest.experts[layer][expert][part]
        tensors, found = self.file(version.file), dict[str, Tensor]()
        for spec in self.manifest.layers[layer].tensors[part]:
            name = spec.name.replace("{e}", str(expert))
            if name not in tensors:
                raise DamagedError(f"{version.file} lacks {name}")
            found[name] = tensors[name]
        return found

    def require(self, *, dense: Sequence[TensorSpec], layers: Sequence[LayerEntry]) -> None:
        """Check that the checkpoint fits a model, before anything is loaded.

        Args:
            dense: Name, dtype and shape of the model's dense tensors.
            layers: The model's MoE layers.

        Raises:
            IncompleteCheckpointError: The checkpoint lacks tensors or experts; names them.
        """
        where = f"checkpoint of step {self.manifest.step}"
        gaps = list(self.manifest.missing())
        if len(layers) != len(self.manifest.layers):
            gaps.append(f"{len(layers)} MoE layers (it has {len(self.manifest.layers)})")
        for index, (want, have) in enumerate(zip(layers, self.manifest.layers, strict=False)):
            gaps += [expert_name(index, e) for e in range(have.num_experts, want.num_experts)]
            for part, specs in want.tensors.items():
                present = {(s.name, s.dtype, s.shape) for s in have.tensors.get(part, ())}
                gaps += [
                    f"{s.name} {s.dtype}{list(s.shape)}"
                    for s in specs
                    if (s.name, s.dtype, s.shape) not in present
                ]
        gaps += _dense_gaps(dense, self.manifest.dense)
        if gaps:
            raise IncompleteCheckpointError(where=where, missing=tuple(gaps))


def _dense_gaps(want: Sequence[TensorSpec], have: Mapping[str, TensorEntry]) -> list[str]:
    gaps = []
    for spec in want:
        entry = have.get(spec.name)
        if entry is None:
            gaps.append(f"tensor {spec.name}")
        elif (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            shape = list(spec.shape)
            gaps.append(f"{spec.name} as {spec.dtype}{shape} (has {entry.dtype}{entry.shape})")
    return gaps


def expert_versions(
    manifests: Sequence[Manifest], layer: int, expert: int
) -> tuple[tuple[Manifest, Mapping[str, ExpertVersion]], ...]:
    """All complete stored versions of an expert, newest first, each with a manifest naming it.

    A restore tries the versions in this order and takes the first with undamaged files.
    """
    seen: set[tuple[str, ...]] = set()
    versions = []
    for manifest in sorted(manifests, key=lambda m: -m.step):
        parts = manifest.layers[layer].parts()
        version = manifest.experts[layer][expert]
        files = tuple(version[p].file for p in parts if p in version)
        if len(files) < len(parts):
            continue
        same = (*files, str(manifest.oldest(layer, expert).step))
        if same not in seen:
            seen.add(same)
            versions.append((manifest, version))
    return tuple(versions)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredExpert:
    """An expert read from storage.

    ``step``, ``generation`` and ``routed`` are those of its oldest part. ``passed_over`` says what
    was wrong with newer versions.
    """

    tensors: Mapping[str, Tensor]
    step: int
    generation: int
    routed: int
    passed_over: tuple[str, ...]


class StoredExperts:
    """Reads experts from storage, each in its newest undamaged version on the lineage.

    All manifests are read once, when the object is made.
    """

    def __init__(
        self,
        url: str,
        *,
        lineage: Sequence[tuple[int, int]],
        resume_step: int,
        read: ReadFile = read_file,
    ) -> None:
        self._url, self._read = url, read
        self._manifests = [
            m for m in find_checkpoints(url).on_lineage(lineage) if m.step <= resume_step
        ]
        self._readers: dict[int, CheckpointReader] = {}

    def read(self, layer: int, expert: int, *, upto: int | None = None) -> StoredExpert:
        """Read the newest undamaged version of one expert, of step ``upto`` or before.

        Raises:
            StorageError: No version could be read, and storage refused at least one of them.
            NoCheckpointError: There is no such version; the message says what is wrong with each.
        """
        problems, refused = [], None
        for manifest, _ in expert_versions(self._manifests, layer, expert):
            oldest = manifest.oldest(layer, expert)
            if upto is not None and oldest.step > upto:
                continue
            try:
                tensors = self._reader(manifest).expert(layer, expert)
            except (DamagedError, StorageError) as error:
                refused = refused or (error if isinstance(error, StorageError) else None)
                problems.append(str(error))
                continue
            return StoredExpert(
                tensors=tensors,
                step=oldest.step,
                generation=oldest.generation,
                routed=oldest.routed,
                passed_over=tuple(problems),
            )
        if refused is not None:
            raise refused
        what = "; ".join(problems) or "no checkpoint on this run's history has it"
        raise NoCheckpointError(f"{expert_name(layer, expert)} cannot be read from storage: {what}")

    def _reader(self, manifest: Manifest) -> CheckpointReader:
        if manifest.step not in self._readers:
            self._readers[manifest.step] = CheckpointReader(self._url, manifest, read=self._read)
        return self._readers[manifest.step]


class LazyState(Mapping[str, Tensor]):
    """The model's parameters and buffers in one checkpoint, each read on access.

    Names are those of ``model.state_dict()``; an expert's tensors are
    ``{layer path}.experts.{id}.{field}``. A shared tensor has all its names.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.manifest = manifest = reader.manifest
        names: dict[str, tuple[TensorSpec, str]] = {}
        for name, entry in manifest.dense.items():
            spec = TensorSpec(name=name, dtype=entry.dtype, shape=entry.shape)
            names[name] = (spec, entry.file)
        for layer, row in zip(manifest.layers, manifest.experts, strict=True):
            for part in layer.parts():
                for spec in layer.tensors[part]:
                    for expert, versions in enumerate(row):
                        full = spec.name.replace("{e}", str(expert))
                        own = TensorSpec(name=full, dtype=spec.dtype, shape=spec.shape)
                        names[full] = (own, versions[part].file)
        self._entries = {
            name.removeprefix(_MODEL): entry
            for name, entry in sorted(names.items())
            if name.startswith(_MODEL)
        }
        for other, name in tied_of(manifest).items():
            if name in self._entries:
                self._entries[other] = self._entries[name]

    def __getitem__(self, name: str) -> Tensor:
        spec, path = self._entries[name]
        return self._reader.stored(path, spec.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, name: str) -> TensorSpec:
        """Name (as stored), dtype and shape of a tensor; reads no file."""
        spec, _ = self._entries[name]
        return TensorSpec(name=name, dtype=spec.dtype, shape=spec.shape)


def tied_of(manifest: Manifest) -> Mapping[str, str]:
    """Further names of shared tensors, each with the name under which the tensor is stored."""
    tied: Mapping[str, str] = manifest.meta.get("tied", {})
    return tied


def open_state_dict(url: str, *, step: int | None = None) -> LazyState:
    """Open the model of a checkpoint as a mapping that reads tensors on access.

    Args:
        url: Root of the checkpoints.
        step: Step of the checkpoint; by default the newest usable one.

    Raises:
        NoCheckpointError: There is no such checkpoint.
    """
    manifest = newest_usable(url) if step is None else load_manifest(url, step)
    return LazyState(CheckpointReader(url, manifest))

"""The manifest of a checkpoint: its tensors and experts, their files and checksums. PURE.

A checkpoint is a set of files under one root. The manifest names the file of every tensor of the
dense state and of every expert. In a partial checkpoint, some experts point to files of older
checkpoints. Format 1 is defined in docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lazarus.checkpoint.errors import IncompleteCheckpointError
from lazarus.checkpoint.format.image import TensorSpec

FORMAT = 1
SUPPORTED_FORMATS = (1,)
WEIGHTS, OPTIMIZER, FROZEN = "weights", "optimizer", "frozen"
PARTS = (WEIGHTS, OPTIMIZER)  # of an expert, as far as training changes it
ALL_PARTS = (*PARTS, FROZEN)
_ALL_COPIES = 1 << 53  # more than any count of routed copies


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size and sha256 (hex) of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One dense tensor: the file that holds it, its dtype and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertVersion:
    """One part (weights, optimizer state or frozen weights) of one expert at a committed step.

    ``routed`` is the expert's cumulative count of routed copies at ``step``. A restore from this
    version loses the present count minus ``routed`` copies.
    """

    file: str
    step: int
    generation: int
    routed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEntry:
    """One MoE layer: its experts and the tensors that each of them has.

    ``tensors`` maps a part to its tensors; ``{e}`` in a name stands for the global expert id.
    """

    path: str
    num_experts: int
    tensors: Mapping[str, tuple[TensorSpec, ...]]

    def parts(self) -> tuple[str, ...]:
        """The parts of each expert in this layer: those of which it has tensors."""
        return tuple(p for p in ALL_PARTS if self.tensors.get(p))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerEntry:
        """Make an entry from its JSON form."""
        return cls(
            path=str(data["path"]),
            num_experts=int(data["num_experts"]),
            tensors={
                str(part): tuple(TensorSpec.from_json(spec) for spec in specs)
                for part, specs in data["tensors"].items()
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A writer's report of one durable file. The controller builds the manifest from these.

    ``kind`` is ``dense`` or ``expert``. ``specs`` holds the tensors of the file.
    """

    path: str
    num_bytes: int
    sha256: str
    kind: str
    step: int
    generation: int
    layer: int = -1
    expert: int = -1
    routed: int = 0
    parts: tuple[str, ...] = ()
    specs: tuple[TensorSpec, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able form, for reports over the wire."""
        return {
            "path": self.path,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "kind": self.kind,
            "step": self.step,
            "generation": self.generation,
            "layer": self.layer,
            "expert": self.expert,
            "routed": self.routed,
            "parts": list(self.parts),
            "specs": [s.to_json() for s in self.specs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WrittenFile:
        """The inverse of ``to_json``."""
        return cls(
            path=str(data["path"]),
            num_bytes=int(data["bytes"]),
            sha256=str(data["sha256"]),
            kind=str(data["kind"]),
            step=int(data["step"]),
            generation=int(data["generation"]),
            layer=int(data["layer"]),
            expert=int(data["expert"]),
            routed=int(data["routed"]),
            parts=tuple(str(p) for p in data["parts"]),
            specs=tuple(TensorSpec.from_json(s) for s in data["specs"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of one checkpoint.

    ``experts[layer][expert]`` maps each part to its newest version. ``kind`` is ``full`` or
    ``partial``. ``meta`` is JSON-able state of the run.
    """

    job: str
    term: int
    generation: int
    step: int
    kind: str
    created_at_s: float
    lineage: tuple[tuple[int, int], ...]
    layers: tuple[LayerEntry, ...]
    dense: Mapping[str, TensorEntry]
    experts: tuple[tuple[Mapping[str, ExpertVersion], ...], ...]
    files: Mapping[str, FileEntry]
    meta: Mapping[str, Any]
    format: int = FORMAT

    def expert_step(self, layer: int, expert: int) -> int:
        """Step of the oldest part of an expert's version; -1 if a part is missing."""
        versions = self.experts[layer][expert]
        if any(part not in versions for part in self.layers[layer].parts()):
            return -1
        return self.oldest(layer, expert).step

    def oldest(self, layer: int, expert: int) -> ExpertVersion:
        """The oldest part of an expert, which says what a restore loses.

        Frozen weights do not change, so they are as of this checkpoint whenever they were written,
        and no copy routed to a frozen expert is ever lost.
        """
        versions = self.experts[layer][expert]
        trained = [version for part, version in versions.items() if part != FROZEN]
        if trained:
            return min(trained, key=lambda version: version.step)
        frozen = versions[FROZEN]
        return replace(frozen, step=self.step, generation=self.generation, routed=_ALL_COPIES)

    def fresh_experts(self) -> int:
        """The number of experts, over all layers, with a file written for this checkpoint."""
        return sum(
            any(v.step == self.step for v in versions.values())
            for layer in self.experts
            for versions in layer
        )

    def own_bytes(self) -> int:
        """Bytes of the files written for this checkpoint, without files of older checkpoints."""
        prefix = step_folder(self.step) + "/"
        return sum(f.num_bytes for path, f in self.files.items() if path.startswith(prefix))

    def missing(self) -> tuple[str, ...]:
        """Names and parts of experts that have no version."""
        gaps = [
            expert_name(layer, expert) + f" ({part})"
            for layer, entry in enumerate(self.layers)
            for expert in range(entry.num_experts)
            for part in entry.parts()
            if part not in self.experts[layer][expert]
        ]
        return tuple(gaps)


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder below the root."""
    return f"step-{step:08d}"


def step_of_folder(name: str) -> int | None:
    """The inverse of ``step_folder``; None if ``name`` is not a checkpoint's folder."""
    digits = name.removeprefix("step-")
    return int(digits) if name != digits and digits.isdecimal() and len(digits) >= 8 else None


def manifest_path(step: int) -> str:
    """Path of a checkpoint's manifest below the root."""
    return f"{step_folder(step)}/manifest.json"


def expert_name(layer: int, expert: int) -> str:
    """An expert's name in messages, such as ``L3/E17``."""
    return f"L{layer}/E{expert}"


def merged(
    base: Manifest,
    written: Sequence[WrittenFile],
    *,
    previous: Manifest | None,
    dense_names: Collection[str],
    frozen_names: Collection[str] = (),
) -> Manifest:
    """Build a checkpoint's manifest from its new files and the versions in ``previous``.

    Args:
        base: Header of the new checkpoint; ``dense``, ``experts`` and ``files`` are ignored.
        written: Durable files of this checkpoint by all writers, dense and experts.
        previous: Manifest on the same lineage that gives the versions of experts not written now.
        dense_names: Every dense tensor of the run.
        frozen_names: Those of them that do not change: if not written now, they are taken from
            ``previous`` too.

    Raises:
        IncompleteCheckpointError: An expert has no version, or a dense tensor has no file.
        ValueError: Two files hold the same tensor or part, or a file is of another step.
    """
    dense: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    experts = _experts_of(previous, base)
    seen: set[tuple[int, int, str]] = set()
    for item in written:
        if item.step != base.step:
            raise ValueError(f"{item.path} is of step {item.step}, the manifest of {base.step}")
        if item.path in files:  # a share was reported twice, as after a reconnect
            continue
        files[item.path] = FileEntry(num_bytes=item.num_bytes, sha256=item.sha256)
        if item.kind == "dense":
            _add_dense(dense, item)
        else:
            _add_expert(experts, seen, item)
    if previous is not None:
        kept = [name for name in frozen_names if name not in dense and name in previous.dense]
        dense |= {name: previous.dense[name] for name in kept}
        used = {version.file for row in experts for one in row for version in one.values()}
        used |= {dense[name].file for name in kept}
        files |= {path: previous.files[path] for path in used if path not in files}
    new = replace(
        base,
        dense=dense,
        experts=tuple(tuple(layer) for layer in experts),
        files=dict(sorted(files.items())),
    )
    new = replace(new, kind=_kind(new))
    lost = tuple(f"tensor {name}" for name in sorted(dense_names) if name not in dense)
    if missing := new.missing() + lost:
        raise IncompleteCheckpointError(where=f"checkpoint of step {base.step}", missing=missing)
    return new


def _experts_of(previous: Manifest | None, base: Manifest) -> list[list[dict[str, ExpertVersion]]]:
    if previous is None:
        return [[{} for _ in range(entry.num_experts)] for entry in base.layers]
    if [(e.path, e.num_experts) for e in previous.layers] != [
        (e.path, e.num_experts) for e in base.layers
    ]:
        raise ValueError(f"step {previous.step} has other MoE layers than step {base.step}")
    return [[dict(versions) for versions in layer] for layer in previous.experts]


def _kind(manifest: Manifest) -> str:
    fresh = all(
        version.step == manifest.step
        for layer in manifest.experts
        for versions in layer
        for version in versions.values()
    )
    return "full" if fresh else "partial"


def _add_dense(dense: dict[str, TensorEntry], item: WrittenFile) -> None:
    for spec in item.specs:
        if spec.name in dense:
            raise ValueError(f"{spec.name} is in {item.path} and in {dense[spec.name].file}")
        dense[spec.name] = TensorEntry(file=item.path, dtype=spec.dtype, shape=spec.shape)


def _add_expert(
    experts: list[list[dict[str, ExpertVersion]]],
    seen: set[tuple[int, int, str]],
    item: WrittenFile,
) -> None:
    for part in item.parts:
        key = (item.layer, item.expert, part)
        if key in seen:
            raise ValueError(f"{expert_name(item.layer, item.expert)} ({part}) was written twice")
        seen.add(key)
        experts[item.layer][item.expert][part] = ExpertVersion(
            file=item.path, step=item.step, generation=item.generation, routed=item.routed
        )

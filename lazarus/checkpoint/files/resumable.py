"""Choose the checkpoint that a run resumes from, although files may be damaged. EFFECTS (reads)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lazarus.checkpoint.errors import NoCheckpointError
from lazarus.checkpoint.files.storage import Storage, open_storage, redacted
from lazarus.checkpoint.files.store import find_checkpoints
from lazarus.checkpoint.files.verify import file_problem
from lazarus.checkpoint.format.manifest import ExpertVersion, Manifest, expert_name


@dataclass(frozen=True, kw_only=True, slots=True)
class OlderVersion:
    """An expert that is resumed from an older version, because a file of its own is damaged.

    ``step`` is that of the older version, ``problem`` what is wrong with the damaged file.
    """

    layer: int
    expert: int
    step: int
    behind_steps: int  # behind the version that the checkpoint names
    problem: str

    def __str__(self) -> str:
        name = expert_name(self.layer, self.expert)
        return f"{name} comes from step {self.step}: {self.problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumable:
    """The newest checkpoint from which all state can be restored.

    Attributes:
        manifest: The checkpoint's manifest, as stored.
        older: Experts restored from an older version, because a file of them is damaged.
        passed_over: What is wrong with each newer checkpoint.
    """

    manifest: Manifest
    older: tuple[OlderVersion, ...] = ()
    passed_over: tuple[str, ...] = ()


def newest_resumable(url: str, *, lineage: Sequence[tuple[int, int]] | None = None) -> Resumable:
    """Find the newest checkpoint on the lineage with undamaged dense state.

    Partial checkpoints share files, so a single damaged file must not make all of them unusable.
    An expert with a damaged file is taken from its newest undamaged older version. The caller
    reports this and counts the lost tokens.

    Args:
        url: Root of the checkpoints.
        lineage: History known from a journal; None takes the one recorded in the manifests.

    Raises:
        NoCheckpointError: No checkpoint is usable; the message says what is wrong with each.
    """
    found = find_checkpoints(url)
    files = _Files(open_storage(url))
    reasons = [str(error) for _, error in found.unreadable]
    true = found.on_lineage(lineage)
    for at in reversed(range(len(true))):
        manifest = true[at]
        problem = _dense_problem(files, manifest) or next(iter(manifest.missing()), "")
        if not problem:
            older, problem = _older_versions(files, manifest, true[:at])
            if not problem:
                return Resumable(manifest=manifest, older=older, passed_over=tuple(reasons))
        reasons.append(f"checkpoint of step {manifest.step}: {problem}")
    what = "; ".join(reasons[:4]) if reasons else "no checkpoint folder with a manifest"
    raise NoCheckpointError(f"no usable checkpoint at {redacted(url)}: {what}")


@dataclass
class _Files:
    """A cache of checked files, so that each file is read once."""

    storage: Storage
    seen: dict[tuple[str, str], str] = field(default_factory=dict)

    def problem(self, manifest: Manifest, path: str) -> str:
        """What is wrong with a file; empty if the file is sound."""
        key = (path, manifest.files[path].sha256)
        if key not in self.seen:
            wrong = file_problem(self.storage, path, manifest)
            self.seen[key] = f"{path} {wrong}" if wrong else ""
        return self.seen[key]


def _dense_problem(files: _Files, manifest: Manifest) -> str:
    paths = sorted({entry.file for entry in manifest.dense.values()})
    return next((p for p in (files.problem(manifest, path) for path in paths) if p), "")


def _older_versions(
    files: _Files, manifest: Manifest, before: Sequence[Manifest]
) -> tuple[tuple[OlderVersion, ...], str]:
    """Experts that need an older version, and an empty string.

    If an expert has no sound version at all: no experts, and the problem of its file.
    """
    older = []
    for layer, experts in enumerate(manifest.experts):
        for expert, version in enumerate(experts):
            problem = _version_problem(files, manifest, version)
            if not problem:
                continue
            wanted = manifest.expert_step(layer, expert)
            step = _newest_sound(files, before, layer, expert)
            if step is None:
                return (), problem
            older.append(
                OlderVersion(
                    layer=layer,
                    expert=expert,
                    step=step,
                    behind_steps=wanted - step,
                    problem=problem,
                )
            )
    return tuple(older), ""


def _newest_sound(
    files: _Files, manifests: Sequence[Manifest], layer: int, expert: int
) -> int | None:
    for one in reversed(manifests):
        version = one.experts[layer][expert]
        if version and not _version_problem(files, one, version):
            return one.expert_step(layer, expert)
    return None


def _version_problem(
    files: _Files, manifest: Manifest, version: Mapping[str, ExpertVersion]
) -> str:
    checks = (files.problem(manifest, part.file) for part in version.values())
    return next((problem for problem in checks if problem), "")

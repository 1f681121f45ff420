"""Find the checkpoint to resume from: the newest usable one at one or several places."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazarus.checkpoint.errors import CheckpointError
from lazarus.checkpoint.files.resumable import Resumable, newest_resumable
from lazarus.checkpoint.files.storage import is_url, redacted
from lazarus.checkpoint.files.store import Found, find_checkpoints
from lazarus.checkpoint.format.manifest import Manifest
from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.config.changes import decisive, resume_problems
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError
from lazarus.runtime.controller.manifests import stored_of


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A usable checkpoint to resume from.

    ``url`` is where the checkpoint is stored, ``next_generation`` the first generation of the
    resumed run, ``others`` all checkpoints on the lineage up to this one.
    """

    url: str
    manifest: Manifest
    next_generation: int
    others: tuple[StoredCheckpoint, ...]
    warnings: tuple[str, ...] = ()  # damaged checkpoints, and older versions used instead

    @property
    def lives(self) -> tuple[str, ...]:
        """Ids of the runs that this checkpoint continues, oldest first."""
        return tuple(str(run) for run in self.manifest.meta.get("lives", (self.manifest.job,)))

    @property
    def step(self) -> int:
        return self.manifest.step

    def control(self) -> dict[str, Any]:
        """The fields of ``ControlConfig`` that describe this checkpoint."""
        return {
            "resume": self.url,
            "start_step": self.step,
            "start_generation": self.next_generation - 1,
            "start_lineage": tuple((g, b) for g, b in self.manifest.lineage),
            "checkpoints": self.others,
            "stored": stored_of(self.manifest),
            "start_plt": lost_until(self.manifest),
            "start_plt_spent": float(self.manifest.meta.get("plt", {}).get("spent", 0.0)),
        }


def lost_until(manifest: Manifest) -> PltLedger:
    """The routed copies lost before a checkpoint, and those lost by resuming from it."""
    ledger = PltLedger.from_json(manifest.meta.get("plt", {}).get("lost", []))
    routed = [[int(count) for count in row] for row in manifest.meta.get("routed", [])]
    if not routed:
        return ledger
    ledger = ledger.rolled_back(routed)  # a restore may have come between the step and its manifest
    for layer, experts in enumerate(manifest.experts):
        for expert, versions in enumerate(experts):
            saved = manifest.oldest(layer, expert).routed if versions else 0
            if saved < routed[layer][expert]:
                ledger, _ = ledger.restored(
                    layer=layer,
                    expert=expert,
                    version_routed=saved,
                    routed=routed[layer][expert],
                )
    return ledger


def found_at(place: str) -> Found:
    """Read every manifest at a folder or URL.

    Raises:
        ConfigError: The storage cannot be read.
    """
    try:
        return find_checkpoints(place)
    except CheckpointError as problem:
        raise ConfigError(f"the checkpoints at {redacted(place)}: {problem}") from problem
    except Exception as problem:  # a storage backend may raise anything
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise ConfigError(f"cannot read checkpoints at {redacted(place)}: {reason}") from problem


def resume_point(places: Sequence[str], *, own_url: str, steps: int) -> ResumePoint | None:
    """Find the newest usable checkpoint to resume from.

    Args:
        places: Folders or URLs of one run's checkpoints; at equal steps the first place wins.
        own_url: Where the resumed run keeps its checkpoints.
        steps: ``train.steps`` of the resumed run.

    Returns:
        The checkpoint, or None if there are no checkpoints at all.

    Raises:
        ConfigError: No checkpoint is usable, or the run has no steps left.
    """
    stores = {place: found_at(place) for place in dict.fromkeys((*places, own_url))}
    there = {p: s for p, s in stores.items() if p in places and (s.manifests or s.unreadable)}
    if not there:
        return None
    lineage = max((found.lineage() for found in there.values()), key=lambda pairs: pairs[-1:])
    url, found = _newest(list(there), lineage)
    manifest = found.manifest
    is_rescued = url != own_url and own_url in places  # it must still be written to own_url
    if manifest.step > steps or (manifest.step == steps and not is_rescued):
        raise ConfigError(
            f"the newest checkpoint in {redacted(url)} is of step {manifest.step}, and "
            f"train.steps={steps}; nothing is left to do: ask for more steps"
        )
    return ResumePoint(
        url=url,
        manifest=manifest,
        next_generation=max(found.next_generation() for found in stores.values()),
        others=tuple(
            StoredCheckpoint(generation=m.generation, step=m.step, is_full=m.kind == "full")
            for m in there[url].on_lineage(lineage)
            if m.step <= manifest.step
        ),
        warnings=(*found.passed_over, *(str(version) for version in found.older)),
    )


def _newest(places: Sequence[str], lineage: Sequence[tuple[int, int]]) -> tuple[str, Resumable]:
    """The newest usable checkpoint on the lineage, and its place.

    Raises:
        ConfigError: No checkpoint is usable.
    """
    usable: list[tuple[str, Resumable]] = []
    reasons = []
    for place in places:
        try:
            usable.append((place, newest_resumable(place, lineage=lineage)))
        except (CheckpointError, OSError) as problem:
            reasons.append(str(problem))
    if not usable:
        raise ConfigError("; ".join(reasons))
    return max(usable, key=lambda item: item[1].manifest.step)


def check_same_run(
    start: ResumePoint | None,
    config: TrainConfig,
    *,
    beside: Path | None,
    allowed: Collection[str] = (),
) -> str:
    """Check that a resumed run computes the same as the original run.

    Args:
        start: The checkpoint to resume from; its manifest has the decisive keys.
        config: The configuration of the resumed run.
        beside: ``config.toml`` of the original run, used if the manifest lacks these keys.
        allowed: Keys that may differ.

    Returns:
        A warning if nothing can be compared, else "".

    Raises:
        ConfigError: Decisive keys changed; every such key is a problem.
    """
    said = None if start is None else start.manifest.meta.get("config")
    before: Mapping[str, Any] | None = said if isinstance(said, Mapping) else None
    if before is None and beside is not None and beside.is_file():
        before = decisive(TrainConfig.load(beside))
    if problems := resume_problems(before or {}, config, allowed=allowed):
        raise ConfigError(problems)
    if before is not None or start is None:
        return ""
    return (
        f"the checkpoint of step {start.step} does not say which configuration it was made with "
        f"(an older version wrote it), so nobody can tell whether this is the same run"
    )


def config_beside(place: str) -> Path | None:
    """The ``config.toml`` of the run whose folder contains a local checkpoint folder, if any."""
    path = place.removeprefix("file://")
    if is_url(path) or not (Path(path).parent / "events.jsonl").is_file():
        return None
    return Path(path).parent / "config.toml"

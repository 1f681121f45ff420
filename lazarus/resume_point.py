"""Where a run goes on from: the newest usable checkpoint of a folder or URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazarus.checkpoint.errors import CheckpointError
from lazarus.checkpoint.manifest import Manifest
from lazarus.checkpoint.recovery import StoredCheckpoint
from lazarus.checkpoint.store import find_checkpoints
from lazarus.checkpoint.verify import newest_usable
from lazarus.errors import ConfigError
from lazarus.runtime.manifests import stored_of


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A usable checkpoint."""

    url: str
    manifest: Manifest
    next_generation: int
    others: tuple[StoredCheckpoint, ...]

    @property
    def step(self) -> int:
        return self.manifest.step

    def control(self) -> dict[str, Any]:
        """What the controller must know of it."""
        return {
            "resume": self.url,
            "start_step": self.step,
            "start_generation": self.next_generation - 1,
            "start_lineage": tuple((g, b) for g, b in self.manifest.lineage),
            "checkpoints": self.others,
            "stored": stored_of(self.manifest),
        }


def resume_point(resume: str | Path | None, *, own_url: str, steps: int) -> ResumePoint | None:
    """Find the checkpoint to go on from.

    Args:
        resume: None: start fresh. "auto": the newest usable checkpoint of this run's own URL, else
            fresh. Else a run's folder, or a URL of checkpoints.
        own_url: Where this run keeps its checkpoints.
        steps: Steps that the run shall reach.

    Raises:
        ConfigError: There is none, or nothing is left to do.
    """
    if resume is None:
        return None
    url = own_url if str(resume) == "auto" else _checkpoints_of(str(resume))
    try:
        manifest = newest_usable(url, check="sha256")
        found = find_checkpoints(url)
    except (CheckpointError, FileNotFoundError) as problem:
        if str(resume) == "auto":
            return None
        raise ConfigError(f"cannot resume from {resume}: {problem}") from problem
    if manifest.step >= steps:
        raise ConfigError(
            f"the newest checkpoint in {url} is of step {manifest.step}, and train.steps={steps}; "
            f"nothing is left to do: ask for more steps"
        )
    return ResumePoint(
        url=url,
        manifest=manifest,
        next_generation=found.next_generation(),
        others=tuple(
            StoredCheckpoint(generation=m.generation, step=m.step, is_full=m.kind == "full")
            for m in found.on_lineage()
        ),
    )


def _checkpoints_of(place: str) -> str:
    """A run's folder holds its checkpoints one level down."""
    folder = Path(place)
    if (folder / "events.jsonl").exists() or (folder / "checkpoints").is_dir():
        return str(folder / "checkpoints")
    return place

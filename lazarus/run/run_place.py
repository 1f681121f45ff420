"""Take the folder of a run and find the checkpoint to resume from, before processes start.

All problems of folder and checkpoint are reported here, before anything is written: another owner,
the record of another run, unusable checkpoints, a configuration that differs from the run's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from lazarus.basics.careful import read_text
from lazarus.basics.files import replaced
from lazarus.checkpoint.files.storage import anchored, redacted
from lazarus.checkpoint.files.store import lives_of
from lazarus.config.layers import toml_of
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.record.ownership import Ownership, take
from lazarus.run.resume_point import (
    ResumePoint,
    check_same_run,
    config_beside,
    found_at,
    resume_point,
)
from lazarus.run.run_folders import (
    is_under_way,
    new_folder,
    persisted_before,
    run_folder,
    runs_of_name,
)

Say = Callable[[str], None]


@dataclass(kw_only=True)
class RunPlace:
    """The folder of a run, owned by this process until ``release``.

    Attributes:
        run_id: Unique id of this life of the run.
        folder: The run's folder.
        url: Where the run keeps its checkpoints.
        config: The run's configuration, with the final folder and absolute paths.
        ownership: The ownership of ``folder``.
        made: Folders that were made for the run, the innermost first; removed by ``leave``.
        start: The checkpoint to resume from; None: the run starts at step 1.
    """

    run_id: str
    folder: Path
    url: str
    config: TrainConfig
    ownership: Ownership
    made: tuple[Path, ...]
    start: ResumePoint | None = None
    _config_before: bytes | None = None
    _wrote_config: bool = False

    def write_config(self) -> None:
        """Write the resolved configuration to ``config.toml`` in the folder.

        Raises:
            ConfigError: The file cannot be written; an existing one is unchanged.
        """
        path = self.folder / "config.toml"
        try:
            self._config_before = path.read_bytes() if path.is_file() else None
            with replaced(path) as partial:
                partial.write_text(self.config.to_toml(), encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, self.config, error) from error
        self._wrote_config = True

    def check_checkpoints(self) -> None:
        """Check that the checkpoint URL holds no checkpoints of other runs.

        This run would overwrite such checkpoints.

        Raises:
            ConfigError: There are checkpoints of another run, or the URL cannot be read.
        """
        start, found = self.start, found_at(self.url)
        if start is not None and start.url == self.url:
            return
        lives = frozenset(() if start is None else start.lives)
        steps = {m.step for m in found.manifests if not lives_of(m) & lives}
        if start is None:
            steps |= {step for step, _ in found.unreadable}
        if not steps:
            return
        place, last = redacted(self.url), max(steps)
        held = f"step {last}" if len(steps) == 1 else f"steps {min(steps)} to {last}"
        text = (
            f"{place} already holds checkpoints of another run ({held}), which this one would "
            f"overwrite; give another checkpoint.url, or go on from them with --resume {place}"
        )
        raise ConfigError(Problem(text, where=self.config.origins.get("checkpoint.url", "")))

    def release(self) -> None:
        """Give the folder back after the run."""
        self.ownership.release()

    def leave(self) -> None:
        """Give the folder back before anything was started, and undo all changes to it."""
        with contextlib.suppress(OSError):  # the folder is full, or gone
            self._restore_config()
        self.release()
        _remove(self.made)

    def _restore_config(self) -> None:
        path = self.folder / "config.toml"
        if self._wrote_config and self._config_before is not None:
            with replaced(path) as partial:
                partial.write_bytes(self._config_before)
        elif self._wrote_config:
            path.unlink(missing_ok=True)


def open_place(
    config: TrainConfig,
    *,
    resume: str | Path | None,
    allow_change: Collection[str] = (),
    in_ray_job: bool | None = None,
    say: Say | None = None,
) -> RunPlace:
    """Take the folder of a run, and find the checkpoint to resume from.

    Args:
        config: The run's configuration.
        resume: None starts a new run. "auto" resumes the newest run of this name in its folder, or
            starts a new run if no run of this name has a checkpoint. Otherwise a run's folder, or
            a folder or URL of checkpoints.
        allow_change: Keys that may differ from the configuration of the resumed run.
        in_ray_job: Whether this is the driver of a Ray job; None: read from the environment.
        say: Called with messages for the user; default: print to stderr.

    Raises:
        ConfigError: The folder belongs to another run, there is no usable checkpoint, or the
            configuration differs from the resumed run's. Nothing was changed.
    """
    say = say or _say
    job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ if in_ray_job is None else in_ray_job
    folder = _going_on(config, in_ray_job=job, say=say) if str(resume) == "auto" else None
    made: tuple[Path, ...] = ()
    if folder is None:
        folder, made = new_folder(config, in_ray_job=job)
    run_id = f"{config.run.name}-{uuid.uuid4().hex[:8]}"
    place = RunPlace(
        run_id=run_id,
        folder=folder,
        url=_own_url(config, folder),
        config=_settled(config, folder),
        ownership=_taken(folder, config, run_id=run_id, made=made, say=say),
        made=made,
    )
    try:
        _refuse_odd_files(folder, config)
        if resume is None:
            _refuse_a_record(folder, config)
        else:
            place.start = _start(place, resume, allow_change, say)
    except BaseException:
        place.leave()
        raise
    return place


def _taken(
    folder: Path, config: TrainConfig, *, run_id: str, made: tuple[Path, ...], say: Say
) -> Ownership:
    limit_s = config.timeouts.owner_gone_s
    try:
        return take(folder, run=run_id, gone_after_s=limit_s, say=say)
    except OSError as error:
        _remove(made)
        raise _unwritable(folder, config, error) from error


def _remove(made: tuple[Path, ...]) -> None:
    """Remove folders that are still empty, the innermost first."""
    with contextlib.suppress(OSError):  # another process wrote into one
        for folder in made:
            folder.rmdir()


def _unwritable(place: Path, config: TrainConfig, error: OSError) -> ConfigError:
    text = f"run.dir {place} cannot be written: {error.strerror}"
    return ConfigError(Problem(text, where=config.origins.get("run.dir", "")))


def _refuse_odd_files(folder: Path, config: TrainConfig) -> None:
    """Raise if a file that the run will write is a folder, dangling link, pipe or device."""
    for name in ("config.toml", "events.jsonl"):
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            text = f"{path} is no regular file; move it away"
            raise ConfigError(Problem(text, where=config.origins.get("run.dir", "")))


def _refuse_a_record(folder: Path, config: TrainConfig) -> None:
    if (folder / "events.jsonl").exists():
        text = (
            f"{folder} already holds the record of a run; give another folder, "
            f"or go on with --resume auto"
        )
        raise ConfigError(Problem(text, where=config.origins.get("run.dir", "")))


def _settled(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration with the final folder, and with absolute paths."""
    url = config.checkpoint.url
    return replace(
        config,
        run=replace(config.run, dir=str(folder)),
        checkpoint=replace(config.checkpoint, url=None if url is None else anchored(url)),
    )


def _own_url(config: TrainConfig, folder: Path) -> str:
    return anchored(config.checkpoint.url or str(folder / "checkpoints"))


def _places_of(folder: Path) -> list[str]:
    """Places that may hold checkpoints of the run in a folder: its URL, and rescued checkpoints."""
    own = _recorded_url(folder) or str(folder / "checkpoints")
    return [anchored(own), str(folder / "rescue")]


def _recorded_url(folder: Path) -> str | None:
    """``checkpoint.url`` from the run's ``config.toml``; None if not set."""
    path = folder / "config.toml"
    if not path.is_file():
        return None
    try:
        url = toml_of(read_text(path))["checkpoint"]["url"]
    except (OSError, ValueError) as problem:
        raise ConfigError(Problem(f"cannot be read: {problem}", where=str(path))) from problem
    except (KeyError, TypeError):
        return None
    return None if url == "none" else str(url)


def _going_on(config: TrainConfig, *, in_ray_job: bool, say: Say) -> Path | None:
    """The folder that ``auto`` resumes: that of the newest run of the name with a checkpoint.

    A run in progress is chosen even without a checkpoint; taking its folder is refused later.
    """
    for folder in runs_of_name(config, in_ray_job=in_ray_job):
        places = [_own_url(config, folder), *_places_of(folder)]
        if is_under_way(folder) or any(map(_holds_some, places)) or persisted_before(folder):
            return folder
        say(f"{folder} has no checkpoint; nothing of it can go on")
    return None


def _holds_some(place: str) -> bool:
    found = found_at(place)
    return bool(found.manifests or found.unreadable)


def _start(
    place: RunPlace, resume: str | Path, allow_change: Collection[str], say: Say
) -> ResumePoint | None:
    """The checkpoint to resume from; None if ``auto`` starts a new run."""
    is_auto = str(resume) == "auto"
    folder = place.folder if is_auto else run_folder(resume)
    places = [anchored(str(resume))] if folder is None else _places_of(folder)
    if is_auto:
        places = list(dict.fromkeys((place.url, *places)))
    beside = config_beside(places[0]) if folder is None else folder / "config.toml"
    problems: list[Problem] = []
    start = None
    try:
        start = resume_point(places, own_url=place.url, steps=place.config.train.steps)
        if start is None and (not is_auto or persisted_before(place.folder)):
            raise ConfigError(f"no checkpoint at {' or '.join(places)}")
    except ConfigError as problem:
        problems = [Problem(f"cannot resume from {resume}: {p}") for p in problem.problems]
    if is_auto and start is None and not problems:
        beside = None  # a new run: there is nothing to compare with
    try:
        warning = check_same_run(start, place.config, beside=beside, allowed=allow_change)
    except ConfigError as problem:
        problems = [*problem.problems, *problems]
    if problems:
        raise ConfigError(problems)
    for text in (*(() if start is None else start.warnings), *([warning] if warning else ())):
        say(f"warning: {text}")
    if start is None:
        say(f"no run named {place.config.run.name} has a checkpoint; this one starts at step 1")
    else:
        say(f"going on from step {start.step}, {start.url}")
    return start


def next_journal(folder: Path) -> str:
    """Name of the next journal: each life of a run has its own, journal, journal-2, ..."""
    numbers = [1] if os.path.lexists(folder / "journal") else []
    numbers += [
        int(path.name[8:]) for path in folder.glob("journal-*") if path.name[8:].isdecimal()
    ]
    return f"journal-{max(numbers) + 1}" if numbers else "journal"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

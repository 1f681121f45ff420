"""Find the folder of a run: a new folder, or that of an earlier run to resume."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from lazarus.basics.careful import read_text
from lazarus.checkpoint.files.storage import anchored, is_url
from lazarus.config.layers import toml_of
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.record.ownership import owner_of

_TIME = "{time}"
_TIMES = r"\d{8}-\d{6}"  # form of {time} in a folder's name
_MOST_ALIKE = 10_000  # largest number of runs with one name that begin within one second


def homes() -> tuple[Path, Path]:
    """Default parents of run folders: ``runs`` here, and ``~/lazarus`` for Ray jobs."""
    return Path("runs").absolute(), Path(anchored("~/lazarus"))


def run_folder(place: str | Path | None) -> Path | None:
    """The absolute folder of an earlier run; None if ``place`` is not a run's folder."""
    if place is None or is_url(str(place)):
        return None
    folder = Path(anchored(str(place)))
    telling = ("config.toml", "events.jsonl", "checkpoints")
    try:
        return folder if any((folder / name).exists() for name in telling) else None
    except (OSError, ValueError):  # not a possible file name
        return None


def new_folder(config: TrainConfig, *, in_ray_job: bool) -> tuple[Path, tuple[Path, ...]]:
    """Make the folder of a new run. A folder named by time is always new.

    Returns:
        The folder, and the folders that were made: none if it existed, else it and the parents that
        did not exist, the innermost first.

    Raises:
        ConfigError: The folder cannot be made.
    """
    first = config.run_dir(now=datetime.now(), in_ray_job=in_ray_job)
    try:
        if _TIME not in config.run_dir_form(in_ray_job=in_ray_job):
            made = _missing(first)
            first.mkdir(parents=True, exist_ok=True)
            return first, made
        for folder in _alike(first):
            made = _missing(folder)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder, made
    except OSError as error:
        text = f"run.dir {first} cannot be made: {error.strerror}"
        raise ConfigError(Problem(text, where=config.origins.get("run.dir", ""))) from error
    raise ConfigError(f"run.dir {first} and {_MOST_ALIKE} more of that name are taken")


def _missing(folder: Path) -> tuple[Path, ...]:
    """The folder and its parents as far as they do not exist, the innermost first."""
    return tuple(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def _alike(first: Path) -> Iterator[Path]:
    yield first
    for number in range(2, _MOST_ALIKE):
        yield first.with_name(f"{first.name}-{number}")


def runs_of_name(config: TrainConfig, *, in_ray_job: bool) -> list[Path]:
    """Folders of runs of this name that ``--resume auto`` may resume, the newest first."""
    form = config.run_dir_form(in_ray_job=in_ray_job)
    if _TIME not in form:
        return [Path(form)] if Path(form).is_dir() else []
    forms = [form]
    if config.run.dir == type(config.run)().dir:
        forms = [str(home / f"{_TIME}-{config.run.name}") for home in homes()]
    found = [folder for text in forms for folder in _matching(text)]
    return sorted(
        (folder for folder in found if _name_of(folder) in (None, config.run.name)),
        key=lambda folder: (_last_sign(folder), folder.name),
        reverse=True,
    )


def _matching(form: str) -> Iterator[Path]:
    parts = form.split(_TIME)
    exact = re.compile(_TIMES.join(map(re.escape, parts)) + r"(-\d+)?")
    for path in glob.iglob("*".join(map(glob.escape, parts)) + "*"):
        if exact.fullmatch(path) and Path(path).is_dir():
            yield Path(path)


def _name_of(folder: Path) -> str | None:
    """``run.name`` from a run's ``config.toml``; None if the file cannot be read."""
    try:
        found = toml_of(read_text(folder / "config.toml"))
        return str(found["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_sign(folder: Path) -> float:
    """Time of the last write to the run's record, else to its ``config.toml``; 0 without both."""
    for name in ("events.jsonl", "config.toml"):
        if (folder / name).is_file():
            return (folder / name).stat().st_mtime
    return 0.0


def is_under_way(folder: Path) -> bool:
    """Whether the folder has an owner whose process is not known to be gone."""
    owner = owner_of(folder)
    return owner is not None and owner.state != "gone"


def persisted_before(folder: Path) -> bool:
    """Whether the run's record has a ``checkpoint_persisted`` event."""
    record = folder / "events.jsonl"
    if not record.is_file():
        return False
    with record.open("rb") as lines:
        return any(b'"checkpoint_persisted"' in line for line in lines)

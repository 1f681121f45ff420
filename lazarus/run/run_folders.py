"""Which folder a run's record goes to: a new one, or that of the run that it goes on with."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lazarus.basics.careful import read_text
from lazarus.checkpoint.files.storage import anchored, is_url
from lazarus.config.layers import toml_of
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.record.ownership import owner_of

_TIME = "{time}"
_TIMES = r"\d{8}-\d{6}"  # what stands for it in a name
_MOST_ALIKE = 10_000  # runs that begin within one second under one name


def homes() -> tuple[Path, Path]:
    """Where runs lie that were given no folder: here, and in the home of a Ray job's user."""
    return Path("runs").absolute(), Path(anchored("~/lazarus"))


def run_folder(place: str | Path | None) -> Path | None:
    """The folder of an earlier run, absolute; None if the place is none (a URL, checkpoints)."""
    if place is None or is_url(str(place)):
        return None
    folder = Path(anchored(str(place)))
    telling = ("config.toml", "events.jsonl", "checkpoints")
    try:
        return folder if any((folder / name).exists() for name in telling) else None
    except (OSError, ValueError):  # no name that a folder can have
        return None


def new_folder(config: TrainConfig, *, in_ray_job: bool) -> tuple[Path, bool]:
    """Make the folder of a new run; one that is named by time is never shared with another run.

    Returns:
        The folder, and whether it was not there before.

    Raises:
        ConfigError: It cannot be made.
    """
    first = config.run_dir(now=datetime.now(), in_ray_job=in_ray_job)
    try:
        if _TIME not in config.run_dir_form(in_ray_job=in_ray_job):
            was_there = first.exists()
            first.mkdir(parents=True, exist_ok=True)
            return first, not was_there
        for folder in _alike(first):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder, True
    except OSError as error:
        text = f"run.dir {first} cannot be made: {error.strerror}"
        raise ConfigError(Problem(text, where=config.origins.get("run.dir", ""))) from error
    raise ConfigError(f"run.dir {first} and {_MOST_ALIKE} more of that name are taken")


def _alike(first: Path) -> Iterator[Path]:
    yield first
    for number in range(2, _MOST_ALIKE):
        yield first.with_name(f"{first.name}-{number}")


def runs_of_name(config: TrainConfig, *, in_ray_job: bool) -> list[Path]:
    """Folders of runs of this name that ``--resume auto`` could go on with, the newest first."""
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
    """The ``run.name`` of a run's configuration; None where it cannot be read."""
    try:
        found = toml_of(read_text(folder / "config.toml"))
        return str(found["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_sign(folder: Path) -> float:
    """When the run last wrote into its record; its configuration is older than any record."""
    for name in ("events.jsonl", "config.toml"):
        if (folder / name).is_file():
            return (folder / name).stat().st_mtime
    return 0.0


def is_under_way(folder: Path) -> bool:
    """Whether the folder has an owner that is not known to have gone."""
    owner = owner_of(folder)
    return owner is not None and owner.state != "gone"


def persisted_before(folder: Path) -> bool:
    """Whether the record says that a checkpoint was persisted."""
    record = folder / "events.jsonl"
    if not record.is_file():
        return False
    with record.open("rb") as lines:
        return any(b'"checkpoint_persisted"' in line for line in lines)

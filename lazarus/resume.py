"""What may differ between a run and its continuation."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lazarus import settings
from lazarus.config import TrainConfig
from lazarus.errors import ConfigError, Problem

# What decides the mathematics stays: a run goes on as the run that it was.
_FREE_SECTIONS = frozenset(
    {
        "cluster",
        "recovery",
        "metrics",
        "checkpoint",
        "security",
        "eval",
        "placement",
        "dispatch",
        "faults",
    }
)
_FREE_KEYS = frozenset(
    {
        "preset",
        "model.preset",
        "data.prefetch_steps",
        "train.steps",
        "train.micro_batch_size",
        "train.recompute",
        "run.dir",
        "run.name",
        "run.digest_every",
        "run.ledger",
    }
)


def resume_problems(
    before: TrainConfig, now: TrainConfig, *, allowed: Collection[str] = ()
) -> list[Problem]:
    """Every key that changed and must not, unless the user allows that key.

    Raises:
        ConfigError: ``allowed`` names a key that does not exist.
    """
    known = settings.keys_of(TrainConfig)
    if unknown := [name for name in allowed if name not in known]:
        raise ConfigError(f"--allow-change {unknown[0]}: there is no such key")
    problems = []
    for dotted in known:
        section = dotted.split(".")[0]
        if section in _FREE_SECTIONS or dotted in _FREE_KEYS or dotted in allowed:
            continue
        old, new = (_value(config, dotted) for config in (before, now))
        if old != new:
            change = f"{settings.toml_value(old)} -> {settings.toml_value(new)}"
            text = f"{dotted} changed since the run began: {change}; --allow-change {dotted}"
            problems.append(Problem(text, key=dotted))
    return problems


def previous_config(resume: str, *, run_dir: Path) -> TrainConfig | None:
    """The configuration of the run that is resumed, where it lies on this machine's disks."""
    folder = run_dir if resume == "auto" else Path(resume).expanduser()
    path = folder / "config.toml"
    return TrainConfig.load(path) if path.is_file() else None


def _value(config: TrainConfig, dotted: str) -> object:
    section, _, name = dotted.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)

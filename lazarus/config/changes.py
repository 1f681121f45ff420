"""Which configuration keys may differ when a run is resumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lazarus.config import layers
from lazarus.config.train_config import TrainConfig
from lazarus.config.values import jsonable, toml_value
from lazarus.errors import ConfigError, Problem

# Sections that do not change what a run computes, and so may differ.
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


def decisive(config: TrainConfig) -> dict[str, Any]:
    """The keys that decide what a run computes: dotted key -> JSON-able value.

    Every checkpoint's manifest holds them as ``meta["config"]``, so that a checkpoint can be
    compared with the run that resumes from it.
    """
    return {
        dotted: jsonable(layers.value_of(config, dotted))
        for dotted in layers.keys_of(TrainConfig)
        if dotted.split(".")[0] not in _FREE_SECTIONS and dotted not in _FREE_KEYS
    }


def resume_problems(
    before: Mapping[str, Any], now: TrainConfig, *, allowed: Collection[str] = ()
) -> list[Problem]:
    """Problems of a resume: keys that must not change, but did.

    Args:
        before: The original run's ``decisive`` keys; a missing key is not compared.
        now: The configuration of the resumed run.
        allowed: Keys that may differ, as given by ``--allow-change``.

    Raises:
        ConfigError: ``allowed`` names a key that does not exist.
    """
    known = layers.keys_of(TrainConfig)
    if unknown := [name for name in allowed if name not in known]:
        raise ConfigError(f"--allow-change {unknown[0]}: there is no such key")
    problems = []
    for dotted, new in decisive(now).items():
        if dotted in allowed or dotted not in before or before[dotted] == new:
            continue
        change = f"{toml_value(before[dotted])} -> {toml_value(new)}"
        text = f"{dotted} changed since the run began: {change}; --allow-change {dotted}"
        problems.append(Problem(text, key=dotted))
    return problems

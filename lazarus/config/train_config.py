"""``TrainConfig``, the whole configuration of a run.

Presets, a TOML file, the environment and the command line are layers over the defaults in
``sections``; ``lazarus config reference`` prints all keys as a table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from lazarus.config import layers as settings
from lazarus.config.layers import Given, setting
from lazarus.config.presets import MODEL_SHAPES, PRESETS
from lazarus.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DispatchConfig,
    FaultsConfig,
    MetricsConfig,
    PlacementConfig,
    RecoveryConfig,
    RunConfig,
    SecurityConfig,
)
from lazarus.config.timeouts import Timeouts, derive_timeouts
from lazarus.config.training_sections import (
    DataConfig,
    EvalConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
)
from lazarus.config.values import jsonable, toml_value
from lazarus.errors import ConfigError, Problem

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DispatchConfig",
    "EvalConfig",
    "FaultsConfig",
    "LoopConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "PlacementConfig",
    "RecoveryConfig",
    "RunConfig",
    "SecurityConfig",
    "TrainConfig",
]

# Environment variable -> key; later ones override earlier ones. LAZARUS_SET holds `a.b=1;c.d=2`.
ENVIRONMENT = (
    ("RAY_ADDRESS", "cluster.address"),
    ("LAZARUS_ADDRESS", "cluster.address"),
    ("LAZARUS_RUN_DIR", "run.dir"),
    ("LAZARUS_SECRET_FILE", "security.secret_file"),
    ("LAZARUS_SET", ""),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a run: one frozen dataclass per section.

    ``origins`` maps each key that was set to the place where it was set ("configs/a.toml:14");
    equality ignores it.
    """

    preset: Literal["tiny", "gpt-s", "gpt-m", "gpt-l"] | None = setting(
        None, "a named starting point for all sections"
    )
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origins": dict(self.origins)}  # a read-only view has no pickle

    @property
    def timeouts(self) -> Timeouts:
        """All time-outs, derived from ``recovery.tolerated_stall_s``."""
        return derive_timeouts(self.recovery.tolerated_stall_s)

    @property
    def seq_len(self) -> int:
        """Input tokens per sample: ``data.seq_len``, or ``model.seq_len`` if not set."""
        return self.data.seq_len or self.model.seq_len

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        overrides: Sequence[str] = (),
        preset: str | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        flags: Mapping[str, Given] = MappingProxyType({}),
        checks: Iterable[Callable[[Self], list[Problem]]] = (),
    ) -> Self:
        """Build a configuration from a file, environment variables and overrides.

        Precedence: default < preset < file < environment < overrides (``--set``) < flags.

        Args:
            path: A TOML file.
            overrides: Texts of the form ``section.key=VALUE``.
            preset: Name of a preset; replaces the preset named in the file.
            environment: Environment variables; only those of ``ENVIRONMENT`` are read.
            flags: Dotted key -> value with the name of the flag.
            checks: Further checks of the finished configuration.

        Raises:
            ConfigError: The configuration is invalid; all problems found, with their places.
        """
        layers, problems = [], []
        sources = [settings.read_toml(path, cls)] if path is not None else []
        sources += _environment_sources(environment)
        sources += [settings.read_override(text, "--set") for text in overrides]
        for layer, wrong in sources:
            layers.append(layer)
            problems += wrong
        layers.append(dict(flags))
        if preset is not None:
            layers.append({"preset": Given(preset, "--preset")})
        return cls._build(layers, problems, checks)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Build a configuration from nested mappings, structured like a TOML file.

        Raises:
            ConfigError: The configuration is invalid; all problems found.
        """
        layer, problems = settings.flatten(mapping, cls, lambda dotted: "")
        return cls._build([layer], problems, ())

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        return cls.from_mapping({k: v for k, v in mapping.items() if v is not None})

    @classmethod
    def _build(
        cls,
        layers: Sequence[settings.Layer],
        problems: list[Problem],
        checks: Iterable[Callable[[Self], list[Problem]]],
    ) -> Self:
        arguments, origins, wrong = settings.assemble(cls, [*_preset_layers(layers), *layers])
        problems = problems + wrong
        config = None
        if arguments is not None:
            config = cls(**arguments, origins=MappingProxyType(origins))
            for check in (_possible_together, *checks):
                problems += settings.located(check(config), origins)
        if problems or config is None:
            raise ConfigError(problems)
        return config

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary with every key, also those at their default."""
        out: dict[str, Any] = {"preset": self.preset}
        for name, section in settings.sections_of(type(self)).items():
            values = getattr(self, name)
            out[name] = {f.name: jsonable(getattr(values, f.name)) for f in fields(section)}
        return out

    def to_toml(self) -> str:
        """The complete configuration as TOML text that loads to an equal configuration."""
        lines = [f"preset = {toml_value(self.preset)}"]
        for name, section in settings.sections_of(type(self)).items():
            lines += ["", f"[{name}]"]
            values = getattr(self, name)
            for f in fields(section):
                lines.append(f"{f.name} = {toml_value(getattr(values, f.name))}")
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """SHA-256 (hex) over model, data, train (without steps), optim and seed."""
        content = self.to_dict()
        decisive = {name: content[name] for name in ("model", "data", "train", "optim")}
        decisive["train"].pop("steps")
        decisive["seed"] = self.run.seed
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def run_dir(self, *, now: datetime, in_ray_job: bool = False) -> Path:
        """The absolute folder of the run, with ``{name}`` and ``{time}`` filled in."""
        text = self.run_dir_form(in_ray_job=in_ray_job)
        return Path(text.replace("{time}", now.strftime("%Y%m%d-%H%M%S")))

    def run_dir_form(self, *, in_ray_job: bool = False) -> str:
        """The absolute path of ``run.dir``, with ``{name}`` filled in but not ``{time}``.

        Inside a Ray job, the default folder lies below the home directory, since the job's working
        directory is a temporary copy.
        """
        default = RunConfig().dir
        form = "~/lazarus/{time}-{name}" if in_ray_job and self.run.dir == default else self.run.dir
        return str(Path(os.path.expanduser(form.replace("{name}", self.run.name))).absolute())

    def given(self, section: str) -> list[str]:
        """Keys of a section that were set, each with its place; to warn of ignored sections."""
        return [f"{k} ({w})" for k, w in self.origins.items() if k.startswith(f"{section}.")]


def _possible_together(config: TrainConfig) -> list[Problem]:
    """Problems between keys of different sections."""
    train, mode = config.train, config.dispatch.mode
    if train.elastic_determinism and mode not in ("auto", "home"):
        text = f"dispatch.mode={mode!r} spreads an expert's tokens by the number of ranks; "
        text += "with train.elastic_determinism use 'home' or 'auto'"
        return [Problem(text, key="dispatch.mode")]
    return []


def _environment_sources(
    environment: Mapping[str, str],
) -> list[tuple[dict[str, Given], list[Problem]]]:
    sources: list[tuple[dict[str, Given], list[Problem]]] = []
    for variable, dotted in ENVIRONMENT:
        value = environment.get(variable, "")
        if not value:
            continue
        if dotted:
            sources.append(({dotted: Given(value, variable)}, []))
        else:
            texts = [text for text in value.split(";") if text.strip()]
            sources += [settings.read_override(text, variable) for text in texts]
    return sources


def _preset_layers(layers: Sequence[settings.Layer]) -> list[settings.Layer]:
    """Layers with the values of the chosen presets; all explicit values override them."""
    chosen: dict[str, Given] = {}
    for layer in layers:
        chosen.update({k: layer[k] for k in ("preset", "model.preset") if k in layer})
    out: list[settings.Layer] = []
    top = chosen.get("preset")
    if top is not None and isinstance(top.value, str) and top.value in PRESETS:
        where = f"preset {top.value}"
        out.append({k: Given(v, where) for k, v in PRESETS[top.value].items()})
    shape = chosen.get("model.preset")
    if shape is not None and isinstance(shape.value, str) and shape.value in MODEL_SHAPES:
        where = f"model.preset {shape.value}"
        out.append({f"model.{k}": Given(v, where) for k, v in MODEL_SHAPES[shape.value].items()})
    return out

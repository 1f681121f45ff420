"""What the folder of a Hugging Face model says of the model, read without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazarus.basics.careful import read_text
from lazarus.config.preflight import TOKEN_FILES
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem

LONGEST = 2048  # tokens of a sample, unless data.seq_len says more
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MOST_BYTES = 16 << 20
_EXPERTS = re.compile(r"(num|n)(_local|_routed)?_experts|moe_num_experts|num_moe_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFolder:
    """A model by its config.json; 0 where the file does not say."""

    model_type: str
    vocab: int
    positions: int
    experts: int


def read_hf_folder(folder: str) -> HfFolder:
    """Read the config.json of a model's folder.

    Raises:
        ConfigError: There is no such folder or file, or it is not that of a model with experts.
    """
    place = Path(folder).expanduser()
    asked = f'model.hf = "{folder}"'
    if not place.is_dir():
        raise _refusal(f"{asked} is no folder (looked at {place.absolute()})")
    try:
        content = json.loads(read_text(place / "config.json", most=_MOST_BYTES))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise _refusal(f"{asked} has no usable config.json: {reason}") from problem
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise _refusal(f"{asked}: config.json names no model_type, so it is not that of a model")
    if not any("expert" in name for part in _parts(content) for name in part):
        text = f"{asked} is a {content['model_type']} model without experts; only models with "
        raise _refusal(f"{text}experts are trained")
    return HfFolder(
        model_type=content["model_type"],
        vocab=_number(content, re.compile("vocab_size")),
        positions=_number(content, re.compile("max_position_embeddings")),
        experts=_number(content, _EXPERTS),
    )


def _refusal(text: str) -> ConfigError:
    return ConfigError(Problem(text, key="model.hf"))


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The table itself, then the tables in it: a model of text and images has one for its text."""
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _number(content: Mapping[str, Any], name: re.Pattern[str]) -> int:
    for part in _parts(content):
        for key, value in part.items():
            if name.fullmatch(key) and type(value) is int:
                return value
    return 0


def hf_problems(config: TrainConfig) -> list[Problem]:
    """Problems of the folder that ``model.hf`` names."""
    if config.model.hf is None:
        return []
    try:
        folder = read_hf_folder(config.model.hf)
    except ConfigError as refusal:
        return list(refusal.problems)
    place = Path(config.model.hf).expanduser()
    if not any((place / name).is_file() for name in _WEIGHTS):
        text = f'model.hf = "{config.model.hf}" has no {" and no ".join(_WEIGHTS)}'
        return [Problem(text, key="model.hf")]
    if folder.positions and config.data.seq_len and config.data.seq_len > folder.positions:
        text = (
            f"data.seq_len={config.data.seq_len} is more than the {folder.positions} positions of "
            f"model.hf"
        )
        return [Problem(text, key="data.seq_len")]
    return []


def sample_len(config: TrainConfig) -> int:
    """Tokens of a sample: ``data.seq_len``, or as many as the model takes, at most ``LONGEST``."""
    if config.model.hf is None or config.data.seq_len:
        return config.seq_len
    return min(LONGEST, read_hf_folder(config.model.hf).positions or LONGEST)


def vocab_of(config: TrainConfig) -> int:
    """Token ids of the model, unless it is built by a function."""
    if config.model.hf is None:
        return config.model.vocab
    return read_hf_folder(config.model.hf).vocab or 1 << 31


def num_experts(config: TrainConfig) -> int:
    """Experts of each layer of the model; 0: they are known when a function has built it."""
    if config.model.builder is not None:
        return 0
    if config.model.hf is None:
        return config.model.experts
    return read_hf_folder(config.model.hf).experts


def hf_warnings(config: TrainConfig) -> list[str]:
    """Warnings about data that a Hugging Face model perhaps does not know."""
    data = config.data
    if config.model.hf is None or data.tokenizer is not None or data.source is not None:
        return []
    if str(data.path or "").endswith(TOKEN_FILES):
        return []
    return ['text is read as bytes; data.tokenizer = "hf" reads it by the model\'s tokenizer']

"""Check before a run that the tokenizer can be read and suits the model."""

from __future__ import annotations

from lazarus.config.hf_folder import vocab_of
from lazarus.config.train_config import TrainConfig
from lazarus.data.tokenizing import open_tokenizer
from lazarus.errors import ConfigError, DataError, Problem


def tokenizer_problems(config: TrainConfig, *, has_model: bool) -> list[Problem]:
    """Problems of ``data.tokenizer``.

    Args:
        config: The run's configuration.
        has_model: The model is given in Python, so nothing is known of its vocabulary.
    """
    key, name = "data.tokenizer", config.data.tokenizer
    if name is None or config.data.source is not None:
        return []
    try:
        tokenizer = open_tokenizer(name, model_folder=config.model.hf)
    except (DataError, ImportError) as problem:
        return [Problem(f'{key} = "{name}": {problem}', key=key)]
    if has_model or config.model.builder is not None:
        return []
    try:
        vocab = vocab_of(config)
    except ConfigError:
        return []  # the folder's own problem
    if tokenizer.vocab <= vocab:
        return []
    text = f'{key} = "{name}" has {tokenizer.vocab:,} token ids, more than the {vocab:,} of '
    whose = "model.vocab" if config.model.hf is None else "model.hf"
    return [Problem(text + whose, key=key)]

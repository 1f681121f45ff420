"""Defaults for what the user does not pass: the GPT-MoE, the corpus, AdamW, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from lazarus.config.hf_folder import sample_len, vocab_of
from lazarus.config.train_config import TrainConfig
from lazarus.data.corpus import TokenDataset, check_tokens, datasets, load_corpus
from lazarus.data.tokenized import tokenized
from lazarus.errors import DataError
from lazarus.model import gpt
from lazarus.model.gpt import GPTOptions


def model(config: TrainConfig) -> nn.Module:
    """The model in the folder ``model.hf``, or the built-in GPT-MoE."""
    if config.model.hf is not None:
        from transformers.utils import logging  # takes seconds to import

        from lazarus import hf

        logging.disable_progress_bar()
        found: nn.Module = hf.load(config.model.hf, recompute=config.train.recompute)
        return found
    return gpt.build(config.model, options=GPTOptions(recompute=config.train.recompute))


def hollow_model(config: TrainConfig) -> nn.Module:
    """The model in the folder ``model.hf`` on the meta device, after a check of its files."""
    from lazarus.hf.skeleton import skeleton

    assert config.model.hf is not None
    return skeleton(config.model.hf)


def training_data(config: TrainConfig) -> Any:
    """Training samples of the configured text.

    Raises:
        DataError: The text is missing, too short, or has tokens outside the vocabulary.
    """
    if config.data.tokenizer is not None:
        return tokenized(config, seq_len=sample_len(config))[0]
    corpus = load_corpus(config.data.path)
    check_tokens(corpus, vocab=vocab_of(config))
    train, _ = datasets(corpus, seq_len=sample_len(config), split=config.data.split)
    return train


def held_out_data(config: TrainConfig) -> Any:
    """Held-out samples of the configured text, which are never trained on.

    Raises:
        DataError: ``data.split`` leaves no samples.
    """
    held_out: Any
    if config.data.tokenizer is not None:
        name, (_, held_out) = str(config.data.path), tokenized(config, seq_len=sample_len(config))
    else:
        corpus = load_corpus(config.data.path)
        name = corpus.name
        _, held_out = datasets(corpus, seq_len=sample_len(config), split=config.data.split)
    if held_out is None:
        raise DataError(
            f"data.split={config.data.split} holds nothing out of {name}; lower it, or set "
            f"eval.every=0"
        )
    return held_out


def prefetch_steps(config: TrainConfig, data: Any) -> int:
    """Steps to read ahead: 0 if the tokens are in memory already."""
    in_memory = isinstance(data, TokenDataset) and not isinstance(data.corpus.tokens, np.memmap)
    return 0 if in_memory else config.data.prefetch_steps


def collate(items: list[Any]) -> Any:
    """Stack tensors of equal shape; nested containers are kept."""
    return default_collate(items)


def optimizer(config: TrainConfig) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """Factory of a fused AdamW with the configured settings."""
    optim = config.optim

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    return make


def schedule(config: TrainConfig) -> Callable[[int], float]:
    """Learning-rate multiplier as a pure function of the step, counted from 1.

    It rises linearly over ``optim.warmup_steps`` steps, whatever the length of the run, and then
    falls as ``optim.schedule`` says.
    """
    optim, steps = config.optim, config.train.steps
    warmup = optim.warmup_steps

    def rate(step: int) -> float:
        if step <= warmup:
            return step / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if optim.schedule == "constant":
            return 1.0
        if optim.schedule == "wsd":
            return 1.0 if done < 0.8 else 1.0 - (1.0 - optim.min_lr_ratio) * (done - 0.8) / 0.2
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine

    return rate


def loss_of(config: TrainConfig) -> Callable[[nn.Module, Any], Any]:
    """The loss of the model that ``model`` builds."""
    if config.model.hf is None:
        return loss
    from lazarus import hf

    return hf.causal_loss


def loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Next-token cross-entropy, summed over tokens."""
    return gpt.loss(module, batch)

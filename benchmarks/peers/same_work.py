"""What every system of goodput_under_faults.py trains: model, text, samples and rates."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from lazarus.data.corpus import datasets, load_corpus
from lazarus.data.sampler import step_sample_ids
from lazarus.model.gpt import GPTConfig

SHAPE = GPTConfig(
    layers=4, dim=64, heads=4, vocab=256, seq_len=64, experts=12, top_k=2, ffn_mult=4, moe_every=2
)
BATCH = 16
LR, WARMUP, CLIP = 1e-3, 20, 1.0


class Samples:
    """The run's text; the samples of a step are a function of seed and step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._train, _ = datasets(load_corpus(), seq_len=SHAPE.seq_len, split=0.98)

    def tokens(self, step: int, *, part: int, parts: int, count: int) -> Tensor:
        """``count`` samples of a step for one of ``parts``; a part that runs short starts over."""
        ids = step_sample_ids(self._seed, step, BATCH, len(self._train)).tolist()
        mine = ids[part % BATCH :: parts] or ids
        rows = [self._train[mine[i % len(mine)]]["tokens"] for i in range(count)]
        return torch.stack(rows)


def rate(step: int) -> float:
    """The learning rate of a step, counted from 1."""
    return LR * min(1.0, step / WARMUP)


def note(log: Path, **fields: object) -> None:
    """One line of the record."""
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"t": time.time(), **fields}) + "\n")

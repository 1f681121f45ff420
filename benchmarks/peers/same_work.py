"""What every system of goodput_under_faults.py trains: model, text, samples and rates."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from goodput_modelled import Device
from goodput_shapes import SHAPES, Shape
from torch import Tensor

from lazarus.data.corpus import datasets, load_corpus
from lazarus.data.sampler import step_sample_ids

LR, WARMUP, CLIP = 1e-3, 20, 1.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a system is told: which model and seed, how often to save, what is modelled."""

    shape: Shape
    seed: int
    every: int
    device: Device
    write_s: float

    @classmethod
    def of(cls, text: str) -> Work:
        """From the JSON of a command line; the shape is named."""
        spec = json.loads(text)
        made = {"shape": SHAPES[spec["shape"]], "device": Device(**spec["device"])}
        return cls(**{**spec, **made})


class Samples:
    """The run's text; the samples of a step are a function of seed and step."""

    def __init__(self, work: Work) -> None:
        self._seed, self._batch = work.seed, work.shape.batch
        self._train, _ = datasets(load_corpus(), seq_len=work.shape.seq_len, split=0.99)

    def tokens(self, step: int, *, part: int, parts: int, count: int) -> Tensor:
        """``count`` samples of a step for one of ``parts``; a part that runs short starts over."""
        ids = step_sample_ids(self._seed, step, self._batch, len(self._train)).tolist()
        mine = ids[part % self._batch :: parts] or ids
        rows = [self._train[mine[i % len(mine)]]["tokens"] for i in range(count)]
        return torch.stack(rows)


def rate(step: int) -> float:
    """The learning rate of a step, counted from 1."""
    return LR * min(1.0, step / WARMUP)


def note(log: Path, **fields: object) -> None:
    """One line of the record."""
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"t": time.time(), **fields}) + "\n")

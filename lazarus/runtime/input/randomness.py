"""The global generators of torch, numpy and Python as one thing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def reseed(seed: int, step: int, sample: int) -> None:
    """All generators from (seed, step, first sample) alone (rule 5)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + sample) % (1 << 63)
    torch.default_generator.manual_seed(mixed)
    cuda: Any = torch.cuda
    if cuda.is_initialized():  # else no device has drawn, nor will in this run
        torch.cuda.manual_seed_all(mixed)
    np.random.seed(mixed % (1 << 32))
    random.seed(mixed)


def fingerprint() -> int:
    """Changes whenever something draws from a global generator."""
    torch_state = hash(torch.get_rng_state().numpy().tobytes())
    numpy_state = repr(np.random.get_state(legacy=False))
    drawn = np.random.get_state(legacy=False)["state"]["key"]
    return hash((torch_state, numpy_state, drawn.tobytes(), random.getstate()))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were."""
    kept: tuple[Any, ...] = (np.random.get_state(), random.getstate())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(kept[0])
            random.setstate(kept[1])

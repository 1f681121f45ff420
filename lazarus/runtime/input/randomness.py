"""Seeds, compares and protects the global random generators of torch, numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def reseed(seed: int, step: int, sample: int) -> None:
    """Seed all generators from seed, step and sample alone (rule 5 of docs/protocol.md)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + sample) % (1 << 63)
    torch.default_generator.manual_seed(mixed)
    cuda: Any = torch.cuda
    if cuda.is_initialized():  # else this process uses no GPU
        torch.cuda.manual_seed_all(mixed)
    np.random.seed(mixed % (1 << 32))
    random.seed(mixed)


def fingerprint() -> int:
    """A hash of the CPU generators' states, which changes when something draws from them."""
    torch_state = hash(torch.get_rng_state().numpy().tobytes())
    numpy_state = repr(np.random.get_state(legacy=False))
    drawn = np.random.get_state(legacy=False)["state"]["key"]
    return hash((torch_state, numpy_state, drawn.tobytes(), random.getstate()))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context that restores the generators to their state before the block."""
    kept: tuple[Any, ...] = (np.random.get_state(), random.getstate())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(kept[0])
            random.setstate(kept[1])

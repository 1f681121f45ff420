"""The shapes of dispatch_vs_peers.py, and which experts its tokens go to.

Shapes: T tokens of one rank, K choices per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIM, HIDDEN, HEADS, VOCAB, SEQ = 256, 1024, 4, 256, 128
LAYERS = 4


@dataclass(frozen=True)
class Setting:
    """One shape of the comparison."""

    ranks: int
    experts: int
    top_k: int
    moe_every: int = 2
    batch: int = 4
    hot: bool = False
    zipf: bool = False
    own: bool = False  # every contender goes by its own router, from the same weights
    trace: bool = False  # experts as popular as in a recorded run
    bf16: bool = False
    dim: int = DIM

    @property
    def hidden(self) -> int:
        return 4 * self.dim

    @property
    def routing(self) -> str:
        known = {"own": self.own, "hot": self.hot, "zipf": self.zipf, "trace": self.trace}
        return next((name for name, is_set in known.items() if is_set), "mild")

    def __str__(self) -> str:
        name = f"{self.ranks} ranks, E={self.experts}, k={self.top_k}"
        name += ", MoE in every layer" if self.moe_every == 1 else ""
        name += ", half of all copies to one expert" if self.hot else ""
        name += ", Zipf popularity" if self.zipf else ""
        name += ", loads of the SmartMoE trace" if self.trace else ""
        name += ", each by its own router" if self.own else ""
        name += f", d={self.dim}" if self.dim != DIM else ""
        return name + (", bf16 autocast" if self.bf16 else "")


TRACE = Path(__file__).parents[2] / "shared/data/expert-load/smartmoe-expert-load.npz"
TRACE_AT = 250  # the middle one of the trace's 501 records, which are ten iterations apart


def choices(setting: Setting, *, rank: int, layer: int) -> Tensor:
    """Where this rank's tokens go in its ``layer``-th MoE layer, the same for all contenders.

    Popularity falls linearly from 1.6 to 0.4 times the mean; or, zipf, like 1 / rank; or, trace, is
    what a run of GPT-MoE recorded (``recorded_load``); or, hot, half of all copies go to expert 0
    and the others alike.

    Returns:
        Expert ids, int64 [T, K].
    """
    random = np.random.default_rng(rank)
    tokens = setting.batch * SEQ
    if setting.trace:
        random = np.random.default_rng((rank, layer))
        return _drawn(recorded_load(setting, layer, TRACE_AT), setting.top_k, tokens, random)
    if not setting.hot:
        popularity = np.linspace(1.6, 0.4, setting.experts)
        if setting.zipf:
            popularity = 1.0 / np.arange(1, setting.experts + 1)
        key = np.log(popularity) + random.gumbel(size=(tokens, setting.experts))
        return torch.from_numpy(np.ascontiguousarray((-key).argsort(1)[:, : setting.top_k]))
    others = random.integers(1, setting.experts, size=tokens)
    if setting.top_k == 1:
        return torch.from_numpy(np.where(np.arange(tokens) % 2 == 0, 0, others)[:, None])
    return torch.from_numpy(np.stack([np.zeros_like(others), others], axis=1))


def loads_before(setting: Setting, *, layer: int) -> Tensor:
    """What a run would plan from: copies per expert in the steps before, int64 [E].

    Of a trace: the record before the one that is replayed.
    """
    if setting.trace:
        return torch.from_numpy(recorded_load(setting, layer, TRACE_AT - 1))
    chosen = [choices(setting, rank=rank, layer=layer).flatten() for rank in range(setting.ranks)]
    return torch.bincount(torch.cat(chosen), minlength=setting.experts)


def recorded_load(setting: Setting, layer: int, record: int) -> np.ndarray:
    """Copies per expert in one record of the trace, int64 [E].

    The MoE layers take recorded layers that lie evenly in the recorded model; where it had more
    experts, neighbours count as one.
    """
    load_LE = _trace()[record]
    num_layers = LAYERS // setting.moe_every
    load_E = load_LE[(2 * layer + 1) * len(load_LE) // (2 * num_layers)]
    return load_E.reshape(setting.experts, -1).sum(1)


@cache
def _trace() -> np.ndarray:
    """Copies per record, layer and expert."""
    return np.load(TRACE)["load"].astype(np.int64)


def _drawn(load_E: np.ndarray, top_k: int, tokens: int, random: np.random.Generator) -> Tensor:
    """Distinct experts for every token, each chosen as often as its load says.

    Systematic sampling: experts lie side by side, each as long as its probability, and every token
    takes those under ``top_k`` marks at distance 1 from a random start. An expert with more than
    one copy a token, which several recorded ones together may have, is chosen by every token.
    """
    wanted_E = load_E / load_E.sum()
    probability_E = np.zeros(len(load_E))
    always_E = np.zeros(len(load_E), dtype=bool)
    while True:
        rest_E = np.where(always_E, 0.0, wanted_E)
        probability_E = np.where(always_E, 1.0, (top_k - always_E.sum()) * rest_E / rest_E.sum())
        if probability_E.max() <= 1.0:
            break
        always_E |= probability_E >= 1.0
    ends_E = probability_E.cumsum()
    marks_TK = random.uniform(size=(tokens, 1)) + np.arange(top_k)
    chosen_TK = np.searchsorted(ends_E, marks_TK * (ends_E[-1] / top_k), side="right")
    chosen_TK = chosen_TK.clip(max=len(load_E) - 1)
    if (np.diff(chosen_TK, axis=1) == 0).any():
        raise AssertionError("a token has the same expert twice")
    return torch.from_numpy(chosen_TK)

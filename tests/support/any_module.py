"""A small model with all sorts of parameters, and one rank of a run around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazarus import MoELayer
from lazarus.checkpoint.files.store import (
    Tag,
    commit_manifest,
    write_files,
)
from lazarus.checkpoint.format.manifest import LayerEntry, WrittenFile
from lazarus.control.vector import StepSums
from lazarus.runtime.saving.final_checkpoint import share_of, share_report
from lazarus.runtime.state.replica import Replica
from placement import PlacementRequest, plan

EXPERTS, DIM = 4, 8
Build = Callable[[], nn.Module]
AdamW = torch.optim.AdamW
TAG = Tag(job="job", term=1, generation=1)


class Tied(nn.Module):
    """A tied head, a frozen bf16 projection, a table that is not state, one that is, dropout."""

    def __init__(self, *, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, DIM)
        self.base = nn.Linear(DIM, DIM, dtype=torch.bfloat16).requires_grad_(False)
        self.norm = nn.LayerNorm(DIM)
        self.moe = MoELayer(
            dim=DIM, hidden=16, num_experts=EXPERTS, top_k=2, activation=activation, bias=bias
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(DIM, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.base(x.bfloat16()).float()
        return self.head(self.drop(x + self.moe(self.norm(x)[None])[0]))


def replica_of(
    build: Build = Tied, *, optimizer: Any = None, seed: int = 0, place: bool = True, **more: Any
) -> Replica:
    replica = Replica(
        build,
        optimizer=optimizer or (lambda groups: AdamW(groups, lr=0.1, weight_decay=0.5)),
        schedule=lambda step: 1.0,
        clip_norm=0.0,
        seed=seed,
        device=torch.device("cpu"),
        num_slots=EXPERTS,
        **more,
    )
    for layer in range(len(replica.layers) if place else 0):
        replica.place(layer, range(EXPERTS), {})
    return replica


def train(replica: Replica, *, steps: int = 1, zero: bool = False) -> None:
    """Steps of one rank, without a run around it; ``zero``: with gradients of zero."""
    shape = (len(replica.layers), replica.num_experts)
    for step in range(1, steps + 1):
        replica.zero_gradients()
        for bank in replica.banks:
            if bank.weight.grad is not None:
                bank.weight.grad.zero_()
        if not zero:
            replica.model(torch.arange(12)).square().sum().backward()
        sums = StepSums(
            step=step, samples=1, count=1.0, sample_hash=0, loss_sum=1.0, aux_sum=0.0,
            found_inf=False, pause=False, times=(0.0,), counts=np.ones(shape),
            squares=replica.expert_square_sums(np.zeros(shape, dtype=np.int32), 0),
        )  # fmt: skip
        with torch.no_grad():
            replica.apply(sums, dense_square=replica.dense_square_sum())


def stored(url: str, replica: Replica, *, step: int = 7) -> None:
    """A full checkpoint by one rank."""
    load = np.ones((len(replica.layers), replica.num_experts))
    alone = plan(PlacementRequest(load=load, num_nodes=1, slots_per_node=EXPERTS, min_replicas=1))
    files = write_files(url, share_of(replica, alone, rank=0, size=1, tag=TAG, step=step), tag=TAG)
    share = share_report(replica, files, rank=0, scalars='{"optimizer": ""}')
    commit_manifest(
        url,
        [WrittenFile.from_json(item) for item in share["files"]],
        tag=TAG,
        step=step,
        layers=[LayerEntry.from_json(entry) for entry in share["layers"]],
        dense_names=share["dense_names"],
        lineage=[(1, 0)],
        meta={key: share[key] for key in ("scalars", "history", "tied")},
        previous=None,
    )


def gelu() -> nn.Module:
    return Tied(activation="gelu", bias=True)

"""Functions that a configuration names: model, data, loss and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lazarus import LossSum, MoELayer, WorkerContext

NUMBER = 3


class Data:
    """Sample i is the number i / 44, four times."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((4, 8), index / 44)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoELayer(dim=8, hidden=16, num_experts=4, top_k=2)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.moe(x))
        return out


def model(ctx: WorkerContext) -> nn.Module:
    return Model()


def data(ctx: WorkerContext) -> Data:
    return Data()


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())


def doubled(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """The built-in loss of the built-in model, twice."""
    from lazarus.model import gpt

    found = gpt.loss(model, batch)
    return LossSum(2 * found.total, found.count)


def letters(ctx: WorkerContext) -> list[dict[str, Tensor]]:
    """Samples for the built-in model."""
    return [{"tokens": torch.arange(9) + first} for first in range(50)]


def descent(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def broken(ctx: WorkerContext) -> nn.Module:
    raise ValueError("no such shape")


def either(ctx: WorkerContext) -> list[dict[str, Tensor]]:
    """Samples for either model."""
    return [{**letter, **Data()[0]} for letter in letters(ctx)]


def any_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """Of either model."""
    from lazarus.model import gpt

    return loss(model, batch) if isinstance(model, Model) else gpt.loss(model, batch)

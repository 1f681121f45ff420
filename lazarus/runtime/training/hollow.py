"""The sizes of a model that has no memory, to plan with its true shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lazarus.model.experts import ExpertBank
from lazarus.model.moe import MoELayer
from lazarus.model.protocol import checked_layers
from lazarus.runtime.state.buffers import Buffers
from lazarus.runtime.state.groups import OptimizerFactory
from lazarus.runtime.state.replica import Replica

_WEIGHT_BYTES = 4  # of a trained parameter, float32


def hollow_shape(
    model: nn.Module, *, optimizer: OptimizerFactory, scratch_buffers: Sequence[str] = ()
) -> dict[str, Any]:
    """What ``Replica.shape`` would say of a model on the meta device, if it had memory.

    The optimizer's state is taken to grow with its parameters, as it does for a small model.

    Raises:
        ValueError: As for ``checked_layers``.
    """
    layers = checked_layers(model)
    banks = [layer.experts for layer in layers.values()]
    own = {id(bank.weight) for bank in banks}
    dense = [p for p in model.parameters() if id(p) not in own]
    trained = sum(p.numel() for p in dense if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in dense if not p.requires_grad)
    buffers = Buffers(model, scratch=scratch_buffers).state()
    per_dense, per_expert = _state_bytes(optimizer)
    first = next(iter(layers.values()))
    return {
        "num_layers": len(layers),
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "dense_bytes": int(trained * (_WEIGHT_BYTES + per_dense))
        + frozen
        + sum(tensor.numel() * tensor.element_size() for _, tensor in buffers),
        "expert_bytes": -(-sum(_expert_bytes(bank, per_expert) for bank in banks) // len(banks)),
    }


def _row_numel(bank: ExpertBank) -> int:
    return int(bank.weight.shape[1])


def _expert_bytes(bank: ExpertBank, per_parameter: float) -> int:
    frozen = 0 if bank.frozen is None else bank.frozen.shape[1] * bank.frozen.element_size()
    return int(_row_numel(bank) * (_WEIGHT_BYTES + per_parameter)) + frozen


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.moe = MoELayer(dim=16, hidden=16, num_experts=1, top_k=1)


def _state_bytes(optimizer: OptimizerFactory) -> tuple[float, float]:
    """Bytes of the optimizer's state for a parameter, of dense ones and of experts."""
    small = Replica(
        _Small,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        clip_norm=0.0,
        seed=0,
        device=torch.device("cpu"),
    )
    state = [t for name, t in small.dense_tensors() if name.startswith("optimizer.")]
    dense = sum(t.numel() * t.element_size() for t in state) / small.flat.numel()
    return dense, small.record_bytes(0) / _row_numel(small.banks[0]) - _WEIGHT_BYTES

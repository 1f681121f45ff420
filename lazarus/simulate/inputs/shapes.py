"""Shapes of well-known models, as far as the cost model needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from lazarus.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of one model.

    Attributes:
        moe_layers: Number of layers with experts.
        dim: Width of the residual stream.
        hidden: Inner width of an expert.
        matrices: Weight matrices of an expert: 2 (GELU) or 3 (gated).
        experts: Routed experts per MoE layer.
        top_k: Experts per token.
        dense_params: Parameters outside the routed experts, including shared experts.
        attention_layers: Number of layers with attention.
        seq_len: Tokens per sample.
        state_bytes: Bytes of training state per parameter: fp16 weight, fp32 master weight, two
            moments.
    """

    name: str
    moe_layers: int
    dim: int
    hidden: int
    matrices: int
    experts: int
    top_k: int
    dense_params: float
    attention_layers: int
    seq_len: int
    state_bytes: float = 14.0

    @property
    def expert_params(self) -> float:
        """Parameters of one expert of one layer."""
        return float(self.matrices * self.dim * self.hidden)

    @property
    def total_params(self) -> float:
        """Parameters of the whole model."""
        return self.dense_params + self.moe_layers * self.experts * self.expert_params

    @property
    def expert_bytes(self) -> float:
        """Bytes of training state of one expert of one layer."""
        return self.expert_params * self.state_bytes

    @property
    def dense_bytes(self) -> float:
        """Bytes of training state of the dense part."""
        return self.dense_params * self.state_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes of a full checkpoint."""
        return self.total_params * self.state_bytes

    @property
    def dense_flops(self) -> float:
        """FLOPs per token of forward and backward of the dense part and of attention."""
        attention = 12.0 * self.attention_layers * self.dim * self.seq_len
        return 6.0 * self.dense_params + attention

    def to_dict(self) -> dict[str, Any]:
        """Return the shape as a dictionary."""
        return asdict(self)


def _gpt(name: str, *, dim: int, experts: int) -> Shape:
    dense = 50257 * dim + 1024 * dim + 12 * 4 * dim * dim
    return Shape(
        name=name, moe_layers=12, dim=dim, hidden=4 * dim, matrices=2, experts=experts, top_k=1,
        dense_params=dense, attention_layers=12, seq_len=1024,
    )  # fmt: skip


def _gated(
    name: str, layers: int, dim: int, hidden: int, experts: int, top_k: int, dense: float
) -> Shape:
    return Shape(
        name=name, moe_layers=layers, dim=dim, hidden=hidden, matrices=3, experts=experts,
        top_k=top_k, dense_params=dense, attention_layers=layers, seq_len=4096,
    )  # fmt: skip


# Source: model cards and the tables of the Lazarus paper; dense = total - routed experts.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            _gpt("gpt-s", dim=768, experts=8),
            _gpt("gpt-m", dim=1024, experts=12),
            _gpt("gpt-l", dim=1024, experts=16),
            _gated("mixtral-8x7b", 32, 4096, 14336, 8, 2, 1.6e9),
            _gated("olmoe-1b-7b", 16, 2048, 1024, 64, 8, 0.48e9),
            _gated("qwen3-30b-a3b", 48, 2048, 768, 128, 8, 1.5e9),
            _gated("deepseek-v3", 58, 7168, 2048, 256, 8, 17e9),
        )
    }
)


def shape_named(name: str) -> Shape:
    """Return a shape by name.

    Raises:
        ConfigError: There is no shape of that name.
    """
    try:
        return SHAPES[name]
    except KeyError:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}") from None

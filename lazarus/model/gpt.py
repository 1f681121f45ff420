"""A decoder-only GPT with experts in every n-th block.

Shapes: B samples, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lazarus.config.presets import MODEL_SHAPES
from lazarus.model.loss import LossSum
from lazarus.model.moe import MoELayer

_IGNORED = -100  # label of a token that does not count


class GPTShape(Protocol):
    """Attributes that a model configuration must have."""

    @property
    def layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def ffn_mult(self) -> int: ...
    @property
    def moe_every(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT-MoE; ``preset`` returns a named shape."""

    layers: int
    dim: int
    heads: int
    vocab: int
    seq_len: int
    experts: int
    top_k: int
    ffn_mult: int = 4
    moe_every: int = 1

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """The shape called ``name``: tiny, gpt-s, gpt-m or gpt-l."""
        return cls(**MODEL_SHAPES[name])


@dataclass(frozen=True, kw_only=True)
class GPTOptions:
    """Balancing, recomputation and initial scale of a GPT, as in ``MoELayer``.

    ``recompute`` also recomputes attention and dense blocks.
    """

    balance: Literal["aux", "bias", "none"] = "aux"
    aux_coef: float = 0.01
    bias_rate: float = 1e-3
    recompute: bool = False
    init_std: float = 0.02


class GPT(nn.Module):
    """Embeddings of tokens and positions, blocks, and a head that shares the token embedding."""

    def __init__(self, shape: GPTShape, options: GPTOptions) -> None:
        super().__init__()
        if shape.dim % shape.heads:
            raise ValueError(f"dim={shape.dim} is not a multiple of heads={shape.heads}")
        self.seq_len = shape.seq_len
        self.token_embedding = nn.Embedding(shape.vocab, shape.dim)
        self.position_embedding = nn.Embedding(shape.seq_len, shape.dim)
        self.blocks = nn.ModuleList(
            Block(shape, options, is_moe=(i + 1) % shape.moe_every == 0)
            for i in range(shape.layers)
        )
        self.final_norm = nn.LayerNorm(shape.dim)
        self.init_std = options.init_std
        self.reset_parameters()

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of tokens [B, S].

        Raises:
            ValueError: There are more positions than the model has.
        """
        length = tokens_BS.shape[1]
        if length > self.seq_len:
            raise ValueError(f"{length} positions, but the model has {self.seq_len}")
        position_S = torch.arange(length, device=tokens_BS.device)
        x_BSD = self.token_embedding(tokens_BS) + self.position_embedding(position_S)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return F.linear(self.final_norm(x_BSD), self.token_embedding.weight)

    def reset_parameters(self) -> None:
        """Draw all dense weights anew, for example after the model was built on the meta device."""
        std = self.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Smaller residual branches, so that activations do not grow with depth.
                scale = (
                    (2 * len(self.blocks)) ** -0.5 if name.endswith((".project", ".down")) else 1.0
                )
                nn.init.normal_(module.weight, std=std * scale)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Attention, then experts or a dense feed-forward; each has a norm before it and a residual."""

    def __init__(self, shape: GPTShape, options: GPTOptions, *, is_moe: bool) -> None:
        super().__init__()
        self.recompute = options.recompute
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.attention = Attention(shape.dim, shape.heads)
        self.ffn_norm = nn.LayerNorm(shape.dim)
        hidden = shape.ffn_mult * shape.dim
        self.ffn: nn.Module = FeedForward(shape.dim, hidden)
        if is_moe:
            self.ffn = MoELayer(
                dim=shape.dim, hidden=hidden, num_experts=shape.experts, top_k=shape.top_k,
                activation="gelu", bias=True, balance=options.balance, aux_coef=options.aux_coef,
                bias_rate=options.bias_rate, init_std=options.init_std,
                recompute=options.recompute,
            )  # fmt: skip
        self.is_moe = is_moe

    def forward(self, x_BSD: Tensor) -> Tensor:
        # An MoE layer recomputes its own activations: its collectives must not run twice.
        x_BSD = x_BSD + self._dense(self._attend, x_BSD)
        if self.is_moe:
            mixed: Tensor = self.ffn(self.ffn_norm(x_BSD))
            return x_BSD + mixed
        return x_BSD + self._dense(self._feed, x_BSD)

    def _dense(self, branch: _Branch, x_BSD: Tensor) -> Tensor:
        if self.recompute and self.training:
            out: Tensor = checkpoint(branch, x_BSD, use_reentrant=False)
            return out
        direct: Tensor = branch(x_BSD)
        return direct

    def _attend(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.attention(self.attention_norm(x_BSD))
        return out

    def _feed(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.ffn(self.ffn_norm(x_BSD))
        return out


class _Branch(Protocol):
    def __call__(self, x_BSD: Tensor, /) -> Tensor: ...


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, length, dim = x_BSD.shape
        qkv = self.qkv(x_BSD).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = _causal_attention(query, key, value)
        out: Tensor = self.project(mixed.transpose(1, 2).reshape(batch, length, dim))
        return out


def _causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of [B, heads, S, D] in the dtype of ``query``, or in fp32 if that is faster.

    For short sequences, a CPU without matrix units takes up to twice as long in bf16 as in fp32.
    """
    if query.dtype == torch.float32 or query.device.type != "cpu" or _has_matrix_units():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), is_causal=True
        )
    return mixed.to(query.dtype)


@cache
def _has_matrix_units() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x_BSD)))
        return out


def build(model_config: GPTShape, *, options: GPTOptions | None = None) -> GPT:
    """Build a GPT-MoE of the given shape.

    Args:
        model_config: A ``GPTConfig``, or any object with the same attributes.
        options: Balancing, recomputation and initial scale.
    """
    return GPT(model_config, options or GPTOptions())


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossSum:
    """Next-token cross-entropy of one micro-batch, summed over the tokens that count.

    Args:
        model: Maps tokens [B, S] to logits [B, S, V].
        batch: ``{"tokens": int64 [B, S + 1]}``; or ``{"input_ids": int64 [B, S + 1]}``, perhaps
            with ``labels`` of the same shape, which are -100 for tokens that do not count.
    """
    if "tokens" in batch:
        tokens = batch["tokens"]
        logits = model(tokens[:, :-1])
        targets = tokens[:, 1:].reshape(-1)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
        return LossSum(total, targets.numel())
    ids = batch["input_ids"]
    targets = batch.get("labels", ids)[:, 1:].reshape(-1)
    logits = model(ids[:, :-1]).flatten(0, 1).float()
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=_IGNORED)
    return LossSum(total, (targets != _IGNORED).sum())

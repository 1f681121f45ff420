"""The same small transformer for every peer: what it computes matters less than how it recovers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCAB, SEQ = 256, 64


class TinyModel(nn.Module):
    """Two pre-norm blocks over bytes; about 0.5 M parameters at dim 128."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        block = nn.TransformerEncoderLayer(
            dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens_BS.shape[1] - 1)
        hidden = self.blocks(self.embed(tokens_BS[:, :-1]), mask=mask, is_causal=True)
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens_BS[:, 1:].reshape(-1))


def batch(step: int, rank: int) -> Tensor:
    """Two samples of random bytes, a function of step and rank alone."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    return torch.randint(0, VOCAB, (2, SEQ + 1), generator=generator)


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients in one new vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def set_gradient(model: nn.Module, flat: Tensor) -> None:
    """The other way round."""
    start = 0
    for param in model.parameters():
        if param.grad is not None:
            stop = start + param.numel()
            param.grad.copy_(flat[start:stop].view_as(param))
            start = stop

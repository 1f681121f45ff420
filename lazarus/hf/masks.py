"""Which tokens the experts get: ``token_mask`` says so for the forward passes inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_mask_T: ContextVar[Tensor | None] = ContextVar("token_mask", default=None)


@contextmanager
def token_mask(mask_BS: Tensor | None) -> Iterator[None]:
    """Context in which tokens of padding are neither routed to experts nor counted.

    Experts add nothing to such a token, and it has no part in loads and balancing.

    Args:
        mask_BS: [B, S], true or 1 for tokens, false or 0 for padding; the ``attention_mask`` of a
            tokenizer fits. Masks of other shapes than [B, S], and None, mask nothing.
    """
    is_flat = mask_BS is not None and mask_BS.dim() == 2
    token = _mask_T.set(mask_BS.reshape(-1).bool() if mask_BS is not None and is_flat else None)
    try:
        yield
    finally:
        _mask_T.reset(token)


def current_mask(num_tokens: int) -> Tensor | None:
    """The mask in force, bool [T].

    Raises:
        ValueError: The mask has another number of tokens than the layer gets.
    """
    mask_T = _mask_T.get()
    if mask_T is not None and mask_T.numel() != num_tokens:
        raise ValueError(
            f"token_mask has {mask_T.numel()} tokens, the experts got {num_tokens}; a mask is "
            f"[B, S] of the model's input"
        )
    return mask_T

"""The loss of a causal language model as a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lazarus.hf.masks import token_mask
from lazarus.model.loss import LossSum

IGNORED = -100


def causal_loss(model: nn.Module, batch: Mapping[str, Any]) -> LossSum:
    """Next-token cross-entropy of one micro-batch, summed over the tokens that count.

    Args:
        model: A transformers model whose output has ``logits``.
        batch: Either ``tokens``, int64 [B, S + 1]; or ``input_ids``, int64 [B, S], with these
            optional keys. ``labels``, int64 [B, S]: what the tokens are to be, -100 for those that
            do not count; default ``input_ids``. ``attention_mask``, [B, S]: 0 for padding, which
            does not count and is not routed to experts. Other keys are passed on to the model.

    Returns:
        The sum, and the number of tokens that were predicted and count.

    Raises:
        ValueError: The batch has neither ``tokens`` nor ``input_ids``, or ``labels`` or an
            ``attention_mask`` beside ``tokens``.
    """
    inputs, labels_BS = _inputs_and_labels(batch)
    with token_mask(inputs.get("attention_mask")):
        logits_BSV = model(**inputs, use_cache=False).logits
    total = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(),
        labels_BS.reshape(-1),
        reduction="sum",
        ignore_index=IGNORED,
    )
    return LossSum(total, (labels_BS != IGNORED).sum())


def _inputs_and_labels(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model, and what each position is to predict."""
    if "tokens" in batch:
        if beside := sorted(batch.keys() & {"labels", "attention_mask"}):
            raise ValueError(f"{', '.join(beside)} beside 'tokens'; use 'input_ids' instead of it")
        tokens_BS: Tensor = batch["tokens"]
        return {"input_ids": tokens_BS[:, :-1]}, tokens_BS[:, 1:]
    if "input_ids" not in batch:
        raise ValueError(
            f"the batch has {sorted(batch)}; causal_loss needs 'tokens' [B, S + 1] or 'input_ids' "
            f"[B, S]"
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels_BS: Tensor = batch.get("labels", batch["input_ids"])
    mask_BS = batch.get("attention_mask")
    if mask_BS is not None and mask_BS.dim() == 2:
        labels_BS = labels_BS.masked_fill(mask_BS == 0, IGNORED)
    last_B1 = torch.full_like(labels_BS[:, :1], IGNORED)  # nothing follows the last token
    return inputs, torch.cat((labels_BS[:, 1:], last_B1), dim=1)

"""A small OLMoE as a folder with a tokenizer and a chat template, and conversations for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_tokenizers import tokenizer_folder

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def olmoe_folder(folder: Path, **changed: Any) -> Path:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**{**SHAPE, **changed})).save_pretrained(str(folder))
    return tokenizer_folder(folder)


def conversations(place: Path, *, count: int = 40) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": f"it is {i % 3}"},
            ]
        }
        for i in range(count)
    ]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place

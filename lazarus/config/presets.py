"""Named model shapes, and presets of whole configurations."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

BYTE_VOCAB = 256  # text is read as bytes, one token per byte

# Source: the model table of the Lazarus paper; vocabulary and length of GPT-2; all layers are MoE.
_GPT: dict[str, Any] = {
    "layers": 12,
    "vocab": 50257,
    "seq_len": 1024,
    "top_k": 1,
    "ffn_mult": 4,
    "moe_every": 1,
}

MODEL_SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": {
            "layers": 4,
            "dim": 128,
            "heads": 4,
            "vocab": 256,
            "seq_len": 128,
            "experts": 8,
            "top_k": 2,
            "ffn_mult": 4,
            "moe_every": 2,
        },
        "gpt-s": _GPT | {"dim": 768, "heads": 12, "experts": 8},
        "gpt-m": _GPT | {"dim": 1024, "heads": 16, "experts": 12},
        "gpt-l": _GPT | {"dim": 1024, "heads": 16, "experts": 16},
    }
)


def _whole(shape: str, **others: Any) -> dict[str, Any]:
    return {f"model.{k}": v for k, v in MODEL_SHAPES[shape].items()} | others


_PAPER = {"train.global_batch": 40, "train.micro_batch_size": 4, "placement.slots_per_node": 6}
_QUICK = {"optim.lr": 1e-3, "optim.warmup_steps": 20, "train.steps": 200}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": _whole("tiny", **_QUICK),
        "gpt-s": _whole("gpt-s", **_PAPER),
        "gpt-m": _whole("gpt-m", **_PAPER),
        "gpt-l": _whole("gpt-l", **_PAPER),
    }
)

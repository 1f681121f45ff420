"""Folders of real models' shapes, whose files are holes: tensors take no room on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]

QWEN3_30B_A3B: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL_8X7B: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def hollow_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write config.json, headers of safetensors files with a layer each, and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for number in range(-1, config["num_hidden_layers"]):
        name = f"model-{number + 2:05d}.safetensors"
        shapes = dict(_ends(config) if number < 0 else _layer(config, number))
        index |= dict.fromkeys(shapes, name)
        _write(folder / name, shapes)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def _write(place: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _ends(config: Mapping[str, Any]) -> Shapes:
    width = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    yield "lm_head.weight", (config["vocab_size"], width)
    yield "model.norm.weight", (width,)


def _layer(config: Mapping[str, Any], number: int) -> Shapes:
    at, width = f"model.layers.{number}", config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{at}.self_attn.{name}_proj.weight", (rows, width)
    yield f"{at}.self_attn.o_proj.weight", (width, queries)
    yield f"{at}.input_layernorm.weight", (width,)
    yield f"{at}.post_attention_layernorm.weight", (width,)
    if config["model_type"] == "mixtral":
        block, up, down = f"{at}.block_sparse_moe", ("w1", "w3"), "w2"
        count, hidden = config["num_local_experts"], config["intermediate_size"]
    else:
        for name in ("q_norm", "k_norm"):
            yield f"{at}.self_attn.{name}.weight", (head,)
        block, up, down = f"{at}.mlp", ("gate_proj", "up_proj"), "down_proj"
        count, hidden = config["num_experts"], config["moe_intermediate_size"]
    yield f"{block}.gate.weight", (count, width)
    for expert in range(count):
        for name in up:
            yield f"{block}.experts.{expert}.{name}.weight", (hidden, width)
        yield f"{block}.experts.{expert}.{down}.weight", (width, hidden)

"""Small Hugging Face checkpoints, and run checkpoints of the same models with other values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lazarus.checkpoint.files.store import RecordKey, commit_manifest, write_files
from lazarus.checkpoint.files.tensors import record_of, specs_of
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.manifest import OPTIMIZER, WEIGHTS, LayerEntry
from lazarus.checkpoint.testing import TAG
from lazarus.model.protocol import moe_layers

_SMALL: Mapping[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_DEEPSEEK: Mapping[str, Any] = {
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_QWEN: Mapping[str, Any] = {
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Qwen3Moe": {**_SMALL, **_QWEN, "head_dim": 8, "tie_word_embeddings": True},
    "Mixtral": {
        **_SMALL,
        "intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Olmoe": {**_SMALL, "intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {**_SMALL, **_DEEPSEEK},
    "DeepseekV2": {**_SMALL, **_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "GptOss": {
        **_SMALL,
        "intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "Qwen2Moe": {**_SMALL, **_QWEN, "shared_expert_intermediate_size": 12},
}


def model_of(family: str, *, seed: int = 0, **changed: Any) -> nn.Module:
    """A small fp32 model of a family, with random values in every parameter."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changed})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    return model  # type: ignore[no-any-return]


def save_source(model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a model with transformers, in another dtype, with a file as a tokenizer has it."""
    import copy

    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 32}\n')
    return folder


def save_run(model: nn.Module, url: str, *, prefix: str = "", step: int = 5, **meta: Any) -> None:
    """Write a run's full checkpoint of a model, under the names of an adopted model."""
    layers, dense = _split(model, prefix)
    entries = []
    records = [record_of(RecordKey(layer=-1, expert=0, step=step, generation=1), dense, tag=TAG)]
    for number, (path, experts) in enumerate(layers.items()):
        for expert, tensors in experts.items():
            key = RecordKey(layer=number, expert=expert, step=step, generation=1)
            records.append(record_of(key, tensors, tag=TAG))
        entries.append(_entry(path, experts))
    commit_manifest(
        url,
        write_files(url, records, tag=TAG),
        tag=TAG,
        step=step,
        layers=entries,
        dense_names=sorted(dense),
        lineage=[(1, 0)],
        meta=meta,
        previous=None,
    )


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder.

    Raises:
        AssertionError: Two files hold one key, or the index does not say what the files hold.
    """
    found: dict[str, Tensor] = {}
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not tensors.keys() & found.keys()
        found |= tensors
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if len(set(where.values())) > 1 or index.exists():
        assert json.loads(index.read_text())["weight_map"] == where
    return found


class Held(dict[str, Tensor]):
    """A state in memory."""

    def spec(self, name: str) -> TensorSpec:
        return specs_of({name: self[name]})[0]


def state_of(model: Any) -> Held:
    """The state of a model under the names of a run."""
    layers = moe_layers(model)
    banks = [f"{path}.experts." for path in layers]
    found = Held((n, t) for n, t in model.state_dict().items() if not n.startswith(tuple(banks)))
    for path, layer in layers.items():
        for expert in range(layer.num_experts):
            for field, tensor in layer.experts.values(expert).items():
                found[f"{path}.experts.{expert}.{field}"] = tensor.clone()
    return found


def _split(
    model: nn.Module, prefix: str
) -> tuple[dict[str, dict[int, dict[str, Tensor]]], dict[str, Tensor]]:
    """Per layer the experts' tensors under their global names; and the dense tensors."""
    layers: dict[str, dict[int, dict[str, Tensor]]] = {}
    dense: dict[str, Tensor] = {}
    paths = [path for path, module in model.named_modules() if hasattr(module, "is_transposed")]
    persistent = set(model.state_dict())
    state = dict(model.named_parameters()) | {
        name: value for name, value in model.named_buffers() if name in persistent
    }
    for name, value in state.items():
        path, _, field = name.rpartition(".")
        if path not in paths:
            dense[f"model.{prefix}{name}"] = value.detach()
            dense[f"optimizer.exp_avg.{prefix}{name}"] = torch.zeros_like(value)
            continue
        experts = layers.setdefault(f"{prefix}{path}.lazarus", {})
        for expert, tensor in enumerate(value.detach()):
            inner = f"{prefix}{path}.lazarus.experts.{expert}.{field}"
            mine = experts.setdefault(expert, {})
            mine[f"model.{inner}"] = tensor.clone()
            mine[f"optimizer.exp_avg.{inner}"] = torch.zeros_like(tensor)
    return layers, dense


def _entry(path: str, experts: Mapping[int, Mapping[str, Tensor]]) -> LayerEntry:
    general = [
        TensorSpec(
            name=s.name.replace(".experts.0.", ".experts.{e}."), dtype=s.dtype, shape=s.shape
        )
        for s in specs_of(experts[0])
    ]
    return LayerEntry(
        path=path,
        num_experts=len(experts),
        tensors={
            WEIGHTS: tuple(s for s in general if s.name.startswith("model.")),
            OPTIMIZER: tuple(s for s in general if not s.name.startswith("model.")),
        },
    )

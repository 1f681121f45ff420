"""Small random models of transformers' mixture-of-experts families, made from configurations."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

NAMED = (
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "deepseek_v2",
    "gpt_oss",
    "qwen2_moe",
)
# A family that is not built here: its only head is for diffusion by blocks.
NOT_BUILT = frozenset({"diffusion_gemma"})

# Values for every configuration that has such a key.
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "decoder_sparse_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "num_nextn_predict_layers": 0,
    # Layers with a state
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "chunk_size": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_chunk_size": 8,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_expand": 2,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_groups": 1,
    "ssm_state_size": 8,
    # Towers of other modalities
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # attention on latents: a head each for keys
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a configuration needs beside; None leaves the key at its default.
_BESIDE: dict[str, dict[str, Any]] = {
    "AXK1Config": _LATENT,
    "AXK2Config": {"num_key_value_heads": 4},
    "BeamConfig": _SPARSE,
    "DeepseekOcr2TextConfig": _SPARSE | {"num_key_value_heads": 4},
    "DeepseekV2Config": _LATENT,
    "DeepseekV32Config": _LATENT,
    "DeepseekV3Config": _LATENT,
    "Dots3NoteTextConfig": {
        "per_layer_config": {},
        "layer_types": ["indexed_attention"] * 2,
        "head_dim": 12,
        "num_key_value_heads": 4,
        "num_attention_heads": 4,
    },
    "Ernie4_5_VLMoeTextConfig": _SPARSE
    | {"moe_intermediate_size": [16, 16], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "FlintConfig": {"mlp_only_layers": []},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "Glm4MoeLiteConfig": _LATENT,
    "Glm4vMoeTextConfig": {
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    },
    "Glm5NextTextConfig": _SPARSE
    | {"num_key_value_heads": 4, "index_kpool": 2, "qk_rope_head_dim": 0},
    "GlmMoeDsaConfig": _LATENT,
    "HYV4VLTextConfig": {
        "rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]},
        "num_key_value_heads": 4,
    },
    "Inkling2LoopTextConfig": {"unpadded_vocab_size": 64},
    "Inkling2TextConfig": {"unpadded_vocab_size": 64},
    "JambaConfig": {"layer_types": None},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mistral4Config": {"num_key_value_heads": 4},
    "MistralLarge4TextConfig": _LATENT,
    "MuseSparkAudioConfig": {
        "patch_sizes": [4, 4],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    },
    "NemotronHConfig": {
        "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": None,
    },
    "Qwen3OmniMoeAudioEncoderConfig": {
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "d_model": 32,
        "output_dim": 32,
        "downsample_hidden_size": 8,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}


@cache
def families() -> tuple[str, ...]:
    """Model folders of transformers whose experts carry the decorator, by name."""
    folder = Path(transformers.__file__).parent / "models"
    marked = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    return tuple(
        sorted(
            path.parent.name
            for path in folder.glob("*/modeling_*.py")
            if marked.search(path.read_text())
        )
    )


def model_class(family: str) -> type[PreTrainedModel]:
    """The class with a language model's head."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = [name for name in dir(module) if getattr(module, name, None).__class__ is type]
    for end in (
        "ForCausalLM",
        "ThinkerForConditionalGeneration",
        "ForConditionalGeneration",
        "ForTokenClassification",
    ):
        for name in own:
            found: type[PreTrainedModel] = getattr(module, name)
            if name.endswith(end) and found.__module__ == module.__name__:
                return found
    raise LookupError(f"{family} has no class with a head")


def small_config(kind: Any, **settings: Any) -> Any:
    """A configuration of this class with small sizes."""
    default = kind()
    wanted = {key: value for key, value in _SMALL.items() if _has(default, key)}
    if _has(default, "layer_types"):
        wanted["layer_types"] = None
    for name in getattr(kind, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None and hasattr(sub, "to_dict"):
            wanted[name] = small_config(type(sub)).to_dict()
    beside = _BESIDE.get(kind.__name__, {})
    left_out = {key for key, value in beside.items() if value is None}
    wanted |= {**beside, **settings}
    return kind(**{key: value for key, value in wanted.items() if key not in left_out})


def _has(config: Any, key: str) -> bool:
    if key in getattr(config, "attribute_map", {}):
        return False
    try:
        return hasattr(config, key)
    except Exception:  # noqa: BLE001 - a value that differs by layer says so by its own exception
        return True


def small_model(family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of the family in fp32, with transformers' eager experts.

    Args:
        family: The model's folder in transformers.
        seed: Seed of the values.
        settings: Keys of the configuration.
    """
    kind = model_class(family)
    torch.manual_seed(seed)
    model = kind(small_config(kind.config_class, **settings))
    model.set_experts_implementation("eager")
    _spread(model)
    return model.train()


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Draw values large enough that routers choose clearly and every tensor matters."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, 0.3 if "gate.weight" in name or "router" in name else 0.1)
        elif parameter.numel() and float(parameter.abs().max()) == 0.0:
            parameter.normal_(0.0, 0.02)


def small_batch(*, rows: int = 3, length: int = 12, seed: int = 1) -> Tensor:
    """Tokens [B, S] that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (rows, length), generator=generator)


def inputs_of(family: str, tokens: Tensor) -> dict[str, Tensor]:
    """What a model needs beside its tokens."""
    if family == "ernie4_5_vl_moe":  # which tokens are text
        return {"moe_mm_token_type_ids": torch.zeros_like(tokens).int()}
    return {}


def saved(model: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    """Save a model as its checkpoints look like."""
    model.save_pretrained(folder, **settings)
    return folder


# ---- comparison with transformers' own experts ------------------------------------------------


def relative(got: Tensor, wanted: Tensor) -> float:
    """Size of the difference relative to what is wanted; its plain size if that is nothing."""
    got, wanted = got.detach().double(), wanted.detach().double()
    size = float(wanted.norm())
    return float((got - wanted).norm()) / (size if size > 1e-7 else 1.0)


def expert_tensors(model: torch.nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """Values or gradients of an adopted model by transformers' names, experts stacked."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        path, is_bank, _ = name.partition(".lazarus.experts.weight")
        if not is_bank:
            found |= {} if value is None else {name: value}
            continue
        layout = model.get_submodule(f"{path}.lazarus.experts").layout
        rows = torch.zeros_like(parameter) if value is None else value
        for field in layout.fields:
            found[f"{path}.{field}"] = torch.stack([layout.views(row)[field] for row in rows])
    return found


def assert_same(
    own: PreTrainedModel,
    other: PreTrainedModel,
    tokens: Tensor,
    *,
    tolerance: float = 1e-5,
    **inputs: Any,
) -> None:
    """Logits, and gradients of a random projection of them, agree."""
    results = []
    for model in (own, other):
        model.zero_grad()
        torch.manual_seed(0)  # some routers add noise
        logits = model(input_ids=tokens, use_cache=False, **inputs).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        mask = inputs.get("attention_mask")
        if mask is not None:
            weights = weights * mask[..., None]
        (logits * weights).sum().backward()
        results.append((logits.detach() * (weights != 0), expert_tensors(model, gradients=True)))
    (wanted_logits, wanted), (logits, got) = results
    assert relative(logits, wanted_logits) <= tolerance
    # Gradients that nearly cancel are rounding errors of large terms, with any implementation.
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        off = float((got.get(name, torch.zeros(())) - gradient).norm())
        assert off <= tolerance * max(float(gradient.norm()), least), f"{name} is off by {off}"
    for name in got.keys() - wanted.keys():
        assert float(got[name].norm()) == 0.0, name

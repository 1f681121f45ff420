"""Models of transformers on Lazarus' experts: the same numbers as with their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_families import assert_same, relative, saved, small_batch, small_config, small_model
from torch import nn

from lazarus.hf import adopt, causal_loss, load, release, token_mask
from lazarus.model.moe import commit_load, take_auxiliary
from lazarus.model.protocol import moe_layers

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    own = small_model(family)
    model = load(saved(own, tmp_path))
    assert type(model) is type(own)
    assert model.training
    assert_same(own, model, small_batch())


def test_a_checkpoint_in_bf16_has_masters_in_fp32(tmp_path: Path) -> None:
    folder = saved(small_model("qwen3_moe").to(torch.bfloat16), tmp_path)
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    own = (
        type(model)
        .from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        .train()
    )
    assert_same(own, model, small_batch())


def test_adopt_and_release_are_inverse() -> None:
    own = small_model("qwen3_moe")
    model = copy.deepcopy(own)
    assert adopt(model) is model
    assert "model.layers.0.mlp.experts.lazarus" in moe_layers(model)
    assert_same(own, model, small_batch())
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts were adopted before"):
        adopt(model)
    release(model, implementation="eager")
    assert model.state_dict().keys() == own.state_dict().keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert_same(own, model, small_batch())
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has no adopted experts"):
        release(model)


def test_a_model_inside_another_module_is_adopted_and_released() -> None:
    wrapped = nn.Sequential(small_model("olmoe"))
    tokens = small_batch()
    wanted = wrapped(tokens).logits
    assert relative(adopt(wrapped)(tokens).logits, wanted) < 1e-6
    assert relative(release(wrapped)(tokens).logits, wanted) < 1e-6


def test_a_model_that_shares_its_configuration_keeps_its_own_experts() -> None:
    config = small_config(transformers.Qwen3MoeConfig)
    one, other = transformers.Qwen3MoeForCausalLM(config), transformers.Qwen3MoeForCausalLM(config)
    tokens = small_batch()
    wanted = other(tokens).logits
    adopt(one)
    assert relative(other(tokens).logits, wanted) < 1e-6


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - its own bytes


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_of_an_adopted_model_are_models_of_their_own(how: Any) -> None:
    model = adopt(small_model("deepseek_v3"), aux_coef=0.1, bias_rate=0.1)
    tokens = small_batch()
    model(tokens)
    take_auxiliary(model)
    copied = how(model)
    assert_same_numbers(model, copied, tokens)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert float(model(tokens).logits.detach().norm()) > 0


def assert_same_numbers(one: nn.Module, other: nn.Module, tokens: torch.Tensor) -> None:
    assert torch.equal(one(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    own = small_model("qwen3_moe")
    model = adopt(copy.deepcopy(own))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(own, model, small_batch())
    counts = [layer.context.counts_E for layer in moe_layers(model).values()]
    assert all(int(counts_E.sum()) == 3 * 12 * 2 for counts_E in counts)


# ---- padding ------------------------------------------------------------------------------------


def padded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    return tokens.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_is_neither_routed_nor_counted(checkpointing: bool) -> None:
    own = small_model("qwen3_moe")
    model = adopt(copy.deepcopy(own))
    tokens, mask = padded(small_batch())
    if checkpointing:  # the backward repeats the forward outside of the mask's context
        model.gradient_checkpointing_enable()
    batch = {"input_ids": tokens, "attention_mask": mask}
    got, wanted = causal_loss(model, batch), causal_loss(own, batch)
    assert int(got.count) == int(wanted.count) == int(mask[:, 1:].sum())
    got.total.backward()
    wanted.total.backward()
    for name, parameter in model.named_parameters():
        if "lazarus" not in name and parameter.grad is not None:
            assert relative(parameter.grad, own.get_parameter(name).grad) < 1e-5, name
    for layer in moe_layers(model).values():
        assert int(layer.context.counts_E.sum()) == int(mask.sum()) * 2


def test_a_mask_of_other_tokens_is_refused() -> None:
    model = adopt(small_model("qwen3_moe"))
    with (
        token_mask(torch.ones(2, 5)),
        pytest.raises(ValueError, match="has 10 tokens, the experts"),
    ):
        model(small_batch())


# ---- loss ---------------------------------------------------------------------------------------


def test_the_loss_counts_what_has_a_label() -> None:
    model = small_model("qwen3_moe")
    tokens = small_batch()
    labels = tokens.clone()
    labels[:, :4] = -100
    loss = causal_loss(model, {"input_ids": tokens, "labels": labels})
    assert int(loss.count) == 3 * 8
    wanted = model(input_ids=tokens, labels=labels).loss
    assert relative(loss.total / loss.count, wanted) < 1e-6
    whole = causal_loss(model, {"tokens": tokens})
    assert int(whole.count) == 3 * 11
    assert relative(whole.total / whole.count, model(input_ids=tokens, labels=tokens).loss) < 1e-6
    nothing = causal_loss(model, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    assert int(nothing.count) == 0
    assert float(nothing.total) == 0.0
    with pytest.raises(ValueError, match=r"the batch has \['text'\]"):
        causal_loss(model, {"text": tokens})


# ---- balancing ----------------------------------------------------------------------------------


def test_the_balancing_loss_is_that_of_the_models_own_router() -> None:
    model = adopt(small_model("qwen3_moe", router_aux_loss_coef=0.25), aux_coef=None)
    tokens, mask = padded(small_batch())
    seen = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda m, args, out: seen.append(out[0].detach()))
    layers = list(moe_layers(model).values())
    for layer in layers:
        layer.context.expected_E = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with token_mask(mask):
        model(input_ids=tokens, attention_mask=mask)
    got = take_auxiliary(model)
    assert got is not None
    wanted = 0.0
    for logits in seen:
        score = torch.softmax(logits, -1)[mask.flatten().bool()]
        wanted += 0.25 * 4 * float((score @ layers[0].context.expected_E).sum())
    assert relative(got, torch.tensor(wanted)) < 1e-6
    got.backward()
    assert float(model.model.layers[0].mlp.gate.weight.grad.norm()) > 0
    model.eval()
    model(input_ids=tokens)
    assert take_auxiliary(model) is None


def test_a_balancing_loss_that_checkpointing_would_lose_is_refused() -> None:
    model = adopt(small_model("qwen3_moe"), aux_coef=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="lost in reentrant gradient checkpointing"):
        model(small_batch())


def test_the_correction_bias_is_moved_by_the_committed_load() -> None:
    model = adopt(small_model("deepseek_v3"), bias_rate=0.5)
    gate = model.model.layers[0].mlp.gate
    before = gate.e_score_correction_bias.clone()
    model(small_batch())
    counts_E = moe_layers(model)["model.layers.0.mlp.experts.lazarus"].context.counts_E.double()
    commit_load(model)
    moved = torch.sign(counts_E.mean() - counts_E).float() * 0.5
    assert float(moved.abs().sum()) > 0
    assert torch.equal(gate.e_score_correction_bias, before + moved)
    still = adopt(small_model("deepseek_v3"))
    assert all(layer.router_bias is None for layer in moe_layers(still).values())


# ---- refusals -----------------------------------------------------------------------------------


def test_what_would_be_wrong_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_router_logits=True adds transformers' own"):
        adopt(small_model("mixtral", output_router_logits=True))
    model = adopt(small_model("mixtral"))
    with pytest.raises(ValueError, match="output_router_logits=True adds transformers' own"):
        model(small_batch(), output_router_logits=True)
    with pytest.raises(ValueError, match="DeepseekV3Config has no router_aux_loss_coef"):
        adopt(small_model("deepseek_v3"), aux_coef=None)
    with pytest.raises(ValueError, match="Qwen3MoeSparseMoeBlock .* has no correction bias"):
        adopt(small_model("qwen3_moe"), bias_rate=0.1)
    with pytest.raises(ValueError, match="has no config.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("dbrx", "DbrxExperts"), ("llama4", "Llama4TextExperts"), ("llama", "LlamaForCausalLM")],
)
def test_experts_of_classes_that_are_not_carried_are_refused_by_name(
    family: str, kind: str
) -> None:
    shapes = {
        "dbrx": lambda: transformers.DbrxForCausalLM(
            transformers.DbrxConfig(
                d_model=32,
                n_heads=4,
                n_layers=1,
                vocab_size=64,
                attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
            )
        ),
        "llama4": lambda: transformers.Llama4ForCausalLM(
            small_config(transformers.Llama4TextConfig, intermediate_size_mlp=32)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(small_config(transformers.LlamaConfig)),
    }
    with torch.device("meta"):
        model = shapes[family]()
    with pytest.raises(ValueError, match=kind):
        adopt(model)

"""What people do with models of transformers: freeze parts, checkpoint, save, mistype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import expert_tensors, relative, saved, small_batch, small_model

from lazarus.hf import adopt, causal_loss, load, lora, release
from lazarus.model.moe import commit_load, moe_layers, take_auxiliary
from lazarus.runtime.state.replica import Replica


def replica_of(build: Any) -> Replica:
    return Replica(
        build,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        schedule=lambda step: 1.0,
        clip_norm=1.0,
        seed=0,
        device=torch.device("cpu"),
        num_slots=8,
    )


def test_the_balancing_loss_and_gradient_checkpointing_go_together(tmp_path: Path) -> None:
    folder = saved(small_model("qwen3_moe"), tmp_path)
    found = []
    for checkpoints in (False, True):
        model = load(folder, aux_coef=0.01)
        if checkpoints:
            model.gradient_checkpointing_enable()
        total = model(small_batch(), use_cache=False).logits.square().sum()
        auxiliary = take_auxiliary(model)
        assert auxiliary is not None
        (total + auxiliary).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert relative(again[name], grad) < 1e-6, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_with_masks_of_their_own_before_one_backward(reentrant: bool) -> None:
    own, tokens = small_model("qwen3_moe"), small_batch()
    masks = [torch.ones_like(tokens), torch.ones_like(tokens)]
    masks[0][0, 5:], masks[1][1, 3:] = 0, 0
    found = []
    for checkpoints in (False, True):
        model = adopt(copy.deepcopy(own)).train()
        if checkpoints:
            how = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model.enable_input_require_grads()
        losses = [
            causal_loss(model, {"input_ids": tokens.roll(at, 0), "attention_mask": mask}).total
            for at, mask in enumerate(masks)
        ]
        sum(losses).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    for name, grad in plain.items():
        assert relative(again[name], grad) < 1e-5, name


def test_a_correction_bias_that_is_a_parameter_stays_what_it_was(tmp_path: Path) -> None:
    own = small_model("ernie4_5_moe")
    name = next(n for n, _ in own.named_parameters() if "correction" in n)
    folder = saved(own, tmp_path)
    still = replica_of(lambda: load(folder))
    before = still.model.state_dict()[name].clone()
    still.zero_gradients()
    still.optimizer.step()
    assert torch.equal(still.model.state_dict()[name], before)
    for build in (lambda: load(folder, bias_rate=0.01), lambda: adopt(own, bias_rate=0.01)):
        moved = replica_of(build)
        assert name in dict(moved.buffers.state())
        (layer, *_) = moe_layers(moved.model).values()
        layer.context.counts_E[0] = 5
        commit_load(moved.model)
        assert not torch.equal(moved.model.state_dict()[name], before)


def test_freezing_some_tensors_of_experts_is_honoured() -> None:
    own = small_model("qwen3_moe")
    for name, parameter in own.named_parameters():
        if "gate_up" in name:
            parameter.requires_grad_(False)
    model = adopt(copy.deepcopy(own))
    before = {n: t.clone() for n, t in expert_tensors(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    causal_loss(model, {"input_ids": small_batch()}).total.backward()
    optimizer.step()
    for name, tensor in expert_tensors(model).items():
        assert torch.equal(tensor, before[name]) == name.endswith("frozen"), name
    back = release(model)
    for name, parameter in back.named_parameters():
        if "experts" in name:
            assert parameter.requires_grad == ("gate_up" not in name), name


def test_an_adopted_model_does_not_save_what_cannot_be_read(tmp_path: Path) -> None:
    model = adopt(small_model("qwen3_moe"))
    with pytest.raises(ValueError, match="call lazarus.hf.release"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    release(model).save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.allclose(again(small_batch()).logits, model(small_batch()).logits, atol=1e-5)


def test_targets_of_lora_that_are_nowhere_are_named() -> None:
    with pytest.raises(ValueError, match=r"gate_up_prj: neither tensors of the experts"):
        lora(adopt(small_model("qwen3_moe")), targets=("q_proj", "gate_up_prj"), r=2)
    model = lora(adopt(small_model("qwen3_moe")), targets="down_proj", r=2)
    assert any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has adapters of lora"):
        release(model)


def test_a_folder_below_home_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(small_model("qwen3_moe"), tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert type(load("~/m")).__name__ == type(load(tmp_path / "m")).__name__


@pytest.mark.parametrize("key", ["labels", "attention_mask"])
def test_what_goes_with_input_ids_alone_is_not_dropped(key: str) -> None:
    tokens = small_batch()
    with pytest.raises(ValueError, match=f"{key} beside 'tokens'"):
        causal_loss(adopt(small_model("qwen3_moe")), {"tokens": tokens, key: tokens})

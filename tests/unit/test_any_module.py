"""What a run makes of any torch module: frozen, tied, in eval mode, on meta."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from any_module import DIM, EXPERTS, Tied, replica_of, stored, train
from safetensors.torch import load_file
from torch import nn

from lazarus import MoELayer
from lazarus.checkpoint.files.export import export
from lazarus.checkpoint.files.reader import open_state_dict
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.errors import UserMistakeError
from lazarus.model import gpt
from lazarus.runtime.saving.rollback_state import read_base

# ---- frozen --------------------------------------------------------------------------------------


def test_a_frozen_parameter_keeps_its_type_and_takes_no_part_but_in_the_state() -> None:
    replica = replica_of()
    base = replica.model.base.weight
    before = base.clone()
    assert base.dtype == torch.bfloat16 and base.grad is None
    trained = sum(p.numel() for p in replica.model.parameters() if p.requires_grad)
    experts = replica.banks[0].weight.numel()
    assert replica.flat.numel() == replica.flat_grad.numel() == trained - experts
    assert id(base) not in {id(p) for g in replica.optimizer.param_groups for p in g["params"]}
    train(replica, steps=2)
    assert torch.equal(base, before)
    names = [name for name, _ in replica.dense_tensors()]
    assert "model.base.weight" in names
    assert not [n for n in names if n.startswith("optimizer") and "base" in n]
    sent = dict(replica.dense_tensors())["model.base.weight"]
    assert sent.data_ptr() == base.data_ptr()  # a joiner receives into it


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_frozen_parameters_of_many_types_are_saved_and_read(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        model = Tied()
        content = torch.arange(6.0).view(2, 3).t().to(dtype)  # not contiguous, as weights may be
        model.odd = nn.Parameter(content, requires_grad=False)
        return model

    def other() -> nn.Module:
        model = build()
        model.odd.data = torch.ones(3, 2).to(dtype)
        return model

    stored(str(tmp_path), replica_of(build))
    second = replica_of(other)
    second.load_dense(read_base(CheckpointRef(str(tmp_path), 7), second).dense)
    found = second.model.odd
    assert found.dtype == dtype
    assert torch.equal(found.float(), torch.arange(6.0).view(2, 3).t().to(dtype).float())


def test_a_trained_parameter_of_another_type_is_refused_with_what_to_do() -> None:
    def build() -> nn.Module:
        model = Tied()
        model.base.requires_grad_(True)
        return model

    with pytest.raises(ValueError, match=r"base.weight is torch.bfloat16.*\.float\(\).*freeze"):
        replica_of(build)


def test_a_frozen_parameter_that_cannot_be_saved_is_refused() -> None:
    def build() -> nn.Module:
        model = Tied()
        model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
        return model

    with pytest.raises(ValueError, match="phase is torch.complex64; a frozen parameter is"):
        replica_of(build)


def test_freezing_after_the_build_is_refused_by_name() -> None:
    replica = replica_of()
    replica.require_unchanged()
    replica.model.norm.requires_grad_(False)
    with pytest.raises(UserMistakeError, match=r"norm.weight, norm.bias changed requires_grad"):
        replica.require_unchanged()


def test_a_model_of_which_nothing_is_trained_is_refused() -> None:
    with pytest.raises(UserMistakeError, match="every parameter of the model is frozen"):
        replica_of(lambda: Tied().requires_grad_(False))


def test_a_function_that_returns_no_module_is_refused() -> None:
    with pytest.raises(UserMistakeError, match="returned dict; it must return a torch.nn.Module"):
        replica_of(dict)


def test_with_all_dense_parameters_frozen_the_experts_train() -> None:
    def build() -> nn.Module:
        model = Tied()
        for name, param in model.named_parameters():
            if ".experts." not in name:
                param.requires_grad_(False)
        return model

    replica = replica_of(build)
    before, dense = replica.banks[0].weight.clone(), replica.dense_digest()
    train(replica)
    assert replica.flat_grad.numel() == 0 and replica.dense_square_sum() == 0.0
    assert not torch.equal(replica.banks[0].weight, before)
    # The counter of optimizer steps of the experts is part of the digest; tensors are as before.
    assert all(name.startswith("model.") for name, _ in replica.dense_tensors())
    assert dense != replica.dense_digest()


# ---- mode, values --------------------------------------------------------------------------------


def test_a_model_built_in_eval_mode_trains_in_training_mode() -> None:
    replica = replica_of(lambda: Tied().eval())
    assert all(module.training for module in replica.model.modules())
    replica.model(torch.arange(12))
    assert replica.layers[0].context.aux_sum is not None  # the balancing loss


def test_a_module_that_overrides_train_stays_in_eval_mode() -> None:
    class Still(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Still:
            return super().train(False)

    def build() -> nn.Module:
        model = Tied()
        model.still = Still(3)
        return model

    replica = replica_of(build)
    assert replica.model.training and not replica.model.still.training


def test_weights_set_by_the_builder_are_kept() -> None:
    def build() -> nn.Module:
        model = Tied()
        with torch.no_grad():
            model.norm.weight.copy_(torch.arange(8.0))
            model.base.weight.fill_(0.25)
            model.moe.router.weight.fill_(0.5)
        return model

    model = replica_of(build).model
    assert torch.equal(model.norm.weight, torch.arange(8.0))
    assert bool((model.base.weight == 0.25).all()) and bool((model.moe.router.weight == 0.5).all())


# ---- meta ----------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, DIM)
        self.attention = nn.MultiheadAttention(DIM, 2)
        self.moe = MoELayer(dim=DIM, hidden=16, num_experts=EXPERTS, top_k=2)
        self.statistics = nn.BatchNorm1d(3)
        self.head = nn.Linear(DIM, 12, bias=False)
        self.head.weight = self.embed.weight


def on_meta(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind()


def test_a_model_on_the_meta_device_gets_memory_and_values_from_reset_parameters() -> None:
    one, other = (replica_of(lambda: on_meta(Plain)) for _ in range(2))
    model = one.model
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embed.weight
    assert 0.5 < float(model.embed.weight.detach().std()) < 2.0
    assert bool(torch.isfinite(one.flat).all()) and bool(model.moe.experts.weight.any())
    assert one.dense_digest() == other.dense_digest()  # ranks build the same


def test_the_builtin_model_on_the_meta_device_is_drawn_as_on_any_other() -> None:
    shape = gpt.GPTConfig(
        layers=2, dim=32, heads=2, vocab=64, seq_len=16, experts=EXPERTS, top_k=2, moe_every=1
    )
    hollow = replica_of(lambda: on_meta(lambda: gpt.build(shape)))
    plain = replica_of(lambda: gpt.build(shape))
    for (name, own), (_, other) in zip(hollow.dense, plain.dense, strict=True):
        close = pytest.approx(float(other.detach().float().std()), rel=0.25, abs=1e-6)
        assert float(own.detach().float().std()) == close, name


def test_tensors_on_meta_that_nothing_fills_are_refused_by_name() -> None:
    class Rotary(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("angles", torch.arange(4.0), persistent=False)
            self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    with pytest.raises(UserMistakeError, match=r"to scale, angles, mask; build these on a real"):
        replica_of(lambda: on_meta(Rotary))


def test_values_of_a_model_that_is_half_on_meta_are_kept() -> None:
    class Half(Plain):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("cpu"):
                self.loaded = nn.Linear(2, 2)
                nn.init.constant_(self.loaded.weight, 3.0)

        def reset_parameters(self) -> None:
            raise AssertionError("not all of it is on the meta device")

    assert bool((replica_of(lambda: on_meta(Half)).model.loaded.weight == 3.0).all())


# ---- tied, exported ------------------------------------------------------------------------------


def test_an_export_of_tied_weights_loads_strictly(tmp_path: Path) -> None:
    """Resumed, exported, and listed: a shared tensor is stored once and has all its names."""
    url = str(tmp_path / "c")
    replica = replica_of(seed=1)
    train(replica, steps=2)
    assert replica.model.head.weight is replica.model.embed.weight
    stored(url, replica)
    names = [name for name, _ in replica.dense_tensors()]
    assert "model.embed.weight" in names and "model.head.weight" not in names
    export(url, str(tmp_path / "model.safetensors"))
    plain = Tied()
    plain.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
    assert torch.equal(plain.head.weight, replica.model.embed.weight)
    assert torch.equal(plain.moe.experts.weight, replica.banks[0].weight)
    assert torch.equal(plain.base.weight, replica.model.base.weight)
    state = open_state_dict(url)
    assert torch.equal(state["head.weight"], state["embed.weight"]) and "table" not in state
    second = replica_of(seed=2)
    second.load_dense(read_base(CheckpointRef(url, 7), second).dense)
    assert torch.equal(second.model.head.weight, replica.model.head.weight)


def test_a_layer_used_twice_is_exported_under_both_names(tmp_path: Path) -> None:
    class Twice(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.moe

    replica = replica_of(Twice)
    assert len(replica.layers) == 1
    stored(str(tmp_path / "c"), replica)
    export(str(tmp_path / "c"), str(tmp_path / "model.safetensors"))
    plain = Twice()
    plain.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
    assert torch.equal(plain.moe.experts.weight, replica.banks[0].weight)


# ---- beside the run ------------------------------------------------------------------------------


def test_dense_parts_may_be_compiled() -> None:
    def build() -> nn.Module:
        model = Tied()
        model.norm = torch.compile(model.norm, backend="eager")
        return model

    replica, plain = replica_of(build), replica_of()
    for one in (replica, plain):
        torch.manual_seed(0)
        train(one, steps=2)
    for (_, own), (_, other) in zip(replica.dense_tensors(), plain.dense_tensors(), strict=True):
        assert torch.equal(own, other)


def test_a_copy_of_the_model_for_an_average_is_apart_from_it() -> None:
    replica = replica_of()
    train(replica)
    average = copy.deepcopy(replica.model)
    before = average.norm.weight.clone()
    train(replica)
    assert torch.equal(average.norm.weight, before)
    assert average(torch.arange(12)).shape == (12, 12)
    assert not torch.equal(average.norm.weight, replica.model.norm.weight)

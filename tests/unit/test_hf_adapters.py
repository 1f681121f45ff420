"""A run of a model with adapters of peft is exported as peft saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_saved import model_of, save_run, state_of
from safetensors.torch import load_file
from torch import nn

from lazarus.cli import main
from lazarus.hf import load, lora
from lazarus.hf.adapters import save_adapters
from lazarus.runtime.saving.model_origin import origin_of


def adapted(*, seed: int = 0, **settings: Any) -> Any:
    """A model with LoRA on its attention, with other values than at the start."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    model = get_peft_model(model_of("Mixtral"), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}],
    ids=["lora", "dora and a module"],
)
def test_the_export_is_what_peft_would_have_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(seed=1, **settings)
    origin = origin_of(nn.ModuleDict({"inner": model}))
    save_run(model, str(tmp_path / "run"), source="/models/base", adapters=origin["adapters"])
    out = tmp_path / "out"
    asked = ["--layout", "hf", "--out", str(out)]
    assert main(["checkpoint", "export", str(tmp_path / "run"), *asked]) == 0
    model.save_pretrained(tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted/adapter_model.safetensors")
    exported = load_file(out / "adapter_model.safetensors")
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    config = json.loads((out / "adapter_config.json").read_text())
    own = json.loads((tmp_path / "wanted/adapter_config.json").read_text())
    own["auto_mapping"] = None  # peft names the class of the base, if no task is given
    for each in (config, own):
        each["target_modules"] = sorted(each["target_modules"])
    assert config == own | {"base_model_name_or_path": "/models/base"}
    if not settings:
        assert_loads(out, model)


def assert_loads(folder: Path, model: Any) -> None:
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model_of("Mixtral"), folder).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in model.state_dict().items())


def test_adapters_of_other_kinds_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(model_of("Mixtral"), str(tmp_path / "run"), adapters={"a": {"peft_type": "IA3"}})
    asked = ["--layout", "hf", "--like", "/base", "--out", str(tmp_path / "out")]
    assert main(["checkpoint", "export", str(tmp_path / "run"), *asked]) == 2
    assert "adapter a is of kind IA3, not LORA" in capsys.readouterr().err


def test_the_origin_is_the_folder_that_transformers_names(tmp_path: Path) -> None:
    model = model_of("Mixtral")
    assert origin_of(model) == {"source": "", "adapters": {}}
    (tmp_path / "config.json").write_text("{}")
    model.name_or_path = str(tmp_path)  # type: ignore[assignment]
    assert origin_of(nn.Sequential(model))["source"] == str(tmp_path)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3_moe", ("q_proj", "gate_up_proj", "down_proj")),
        ("gpt_oss", ("gate_up_proj", "down_proj")),
        ("mixtral", ("down_proj",)),
    ],
)
def test_adapters_of_experts_are_those_of_peft(
    family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    from hf_families import saved, small_batch, small_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = str(saved(small_model(family), tmp_path / "base"))
    model = lora(load(base), targets=targets, r=4, alpha=8).eval()
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    tokens = small_batch()
    before = model(input_ids=tokens).logits
    assert torch.allclose(before, plain(input_ids=tokens).logits, atol=1e-5)  # B is zero
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    origin = origin_of(model)
    save_adapters(state_of(model), origin["adapters"], out=str(tmp_path / "out"), base=base)
    twin = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    logits, expected = model(input_ids=tokens).logits, twin(input_ids=tokens).logits
    assert not torch.allclose(logits, before, atol=1e-3)
    assert torch.allclose(logits, expected, atol=1e-5)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)

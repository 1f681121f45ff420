"""LoRA in runs that lose a node and go on elsewhere: the training of peft in one process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from hf_families import saved, small_batch, small_model
from hf_saved import contents, state_of
from safetensors.torch import load_file
from torch import Tensor

from lazarus import ElasticTrainer, Result, TrainConfig
from lazarus.data.sampler import step_sample_ids
from lazarus.hf import causal_loss, load, lora
from lazarus.hf.adapters import save_adapters
from lazarus.runtime.saving.model_origin import origin_of
from lazarus.runtime.training import defaults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SAMPLES, STEPS = 64, 4
SETTINGS = (
    "cluster.launcher=process",
    "cluster.nodes=3",
    "cluster.replace_lost=false",
    f"train.steps={STEPS}",
    "train.global_batch=11",
    "train.micro_batch_size=2",
    "optim.lr=0.01",
    "optim.warmup_steps=1",
    "optim.schedule=constant",  # the runs differ in their number of steps
    "checkpoint.full_at_end=true",
    "metrics.progress=off",
    "metrics.report=false",
)


def batch() -> Tensor:
    return small_batch(rows=SAMPLES, length=11, seed=3)


def adapted(base: str, targets: tuple[str, ...]) -> Any:
    """The model of a folder with adapters, the same ones in every process."""
    torch.manual_seed(1)
    return lora(load(base), targets=targets, r=4, alpha=8, frozen_dtype=torch.bfloat16)


def fit(
    folder: Path, base: str, targets: tuple[str, ...], *settings: str, **options: Any
) -> Result:
    config = TrainConfig.load(overrides=[*SETTINGS, f"run.dir={folder}", *settings])
    faults = options.pop("faults", ())
    trainer = ElasticTrainer(
        config,
        model=lambda ctx: adapted(base, targets),
        data=lambda ctx: [{"tokens": row} for row in batch()],
        loss=causal_loss,
        faults=faults,
    )
    return trainer.fit(**options)


def alone(base: str, start: Path, *, steps: int) -> tuple[list[float], Any]:
    """The same steps of peft on transformers' own model in this process, from saved adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = TrainConfig.load(overrides=[*SETTINGS, f"train.steps={steps}"])
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="eager"
    )
    model = PeftModel.from_pretrained(plain, start, is_trainable=True).train()
    optim, rate, tokens, losses = config.optim, defaults.schedule(config), batch(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    for step in range(1, steps + 1):
        ids = step_sample_ids(config.run.seed, step, config.train.global_batch, SAMPLES)
        total, count = causal_loss(model, {"tokens": tokens[[int(i) for i in ids]]})
        optimizer.zero_grad()
        (total / count).backward()
        losses.append(float(total.detach()) / int(count))
        torch.nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * rate(step)
        optimizer.step()
    return losses, model


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj", "gate_up_proj", "down_proj")], ids=str
)
def test_a_kill_and_a_resume_change_neither_losses_nor_frozen_weights(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    base = str(saved(small_model("qwen3_moe").to(torch.bfloat16), tmp_path / "base"))
    local = adapted(base, targets)
    configs = origin_of(local)["adapters"]
    save_adapters(state_of(local), configs, out=str(tmp_path / "start"), base=base)
    first = fit(tmp_path / "a", base, targets, faults=["kill:1@2"])
    last = fit(
        tmp_path / "b", base, targets, "cluster.nodes=2", f"train.steps={STEPS + 2}",
        resume=tmp_path / "a",
    )  # fmt: skip
    expected, twin = alone(base, tmp_path / "start", steps=STEPS + 2)
    losses = {record.step: record.loss for run in (first, last) for record in run.history}
    assert sorted(losses) == list(range(1, STEPS + 3))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step - 1], rel=1e-6), step
    assert_frozen_as_in(local, last.state_dict())
    last.save_pretrained(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    twin.save_pretrained(tmp_path / "twin")
    for name, tensor in load_file(tmp_path / "twin" / "adapter_model.safetensors").items():
        assert torch.allclose(exported[name], tensor, rtol=1e-4, atol=1e-5), name


def assert_frozen_as_in(model: Any, state: Mapping[str, Tensor]) -> None:
    """What is no adapter has the bits that the folder has."""
    own = state_of(model)
    frozen = [name for name in own if "lora_" not in name]
    assert any(".lazarus.experts." in name for name in frozen)
    for name in frozen:
        assert torch.equal(state[name], own[name]), name


def test_a_whole_model_is_saved_without_naming_its_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = saved(small_model("qwen3_moe").to(torch.bfloat16), tmp_path / "base")
    config = TrainConfig.load(
        overrides=[*SETTINGS, "cluster.nodes=2", "train.steps=2", f"run.dir={tmp_path / 'run'}"]
    )
    trainer = ElasticTrainer(
        config,
        model=lambda ctx: load(base),
        data=lambda ctx: [{"tokens": row} for row in batch()],
        loss=causal_loss,
    )
    trainer.fit().save_pretrained(tmp_path / "out")
    source, exported = contents(base), contents(tmp_path / "out")
    assert exported.keys() == source.keys()
    assert all(
        exported[k].dtype == t.dtype and exported[k].shape == t.shape for k, t in source.items()
    )
    key = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert not torch.equal(exported[key], source[key])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info

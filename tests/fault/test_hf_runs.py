"""Models of transformers in runs that lose a node: the training of transformers in one process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from fault_runs import Watched, after, at_step, watch
from hf_families import NAMED, relative, saved, small_batch, small_model
from torch import Tensor

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.files.reader import open_state_dict
from lazarus.data.sampler import step_sample_ids
from lazarus.hf import adopt, causal_loss, load
from lazarus.model.moe import commit_load
from lazarus.record.events import read_events
from lazarus.runtime.training import defaults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SAMPLES, STEPS = 64, 5
SETTINGS = (
    "cluster.launcher=process",
    "cluster.nodes=3",
    "cluster.replace_lost=false",
    f"train.steps={STEPS}",
    "train.global_batch=11",
    "train.micro_batch_size=2",
    "optim.lr=0.001",
    "optim.warmup_steps=2",
    "optim.clip_norm=0.1",
    "placement.slots_per_node=4",
    "metrics.progress=off",
)


class Tokens:
    """Random sequences of tokens."""

    def __init__(self) -> None:
        self.tokens = small_batch(rows=SAMPLES, length=11, seed=3)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index]}


def run(
    folder: Path, checkpoint: Path, *faults: str, settings: tuple[str, ...] = (), **options: Any
) -> tuple[list[float], Mapping[str, Tensor], list[Mapping[str, Any]]]:
    """Losses of the steps, the weights at the end, and what happened."""
    where, tokens = str(checkpoint), Tokens().tokens
    config = TrainConfig.load(overrides=[*SETTINGS, f"run.dir={folder}", *settings])

    def data(ctx: Any) -> Any:
        return [{"tokens": row} for row in tokens]

    def model(ctx: Any) -> Any:
        return load(where, **options)

    trainer = ElasticTrainer(config, model=model, data=data, loss=causal_loss, faults=faults)
    result = trainer.fit()
    return (
        [record.loss for record in result.history],
        result.state_dict(),
        list(read_events(folder / "events.jsonl")),
    )


def alone(model: Any) -> list[float]:
    """The same steps with transformers' own experts in this process; changes the model."""
    config = TrainConfig.load(overrides=[*SETTINGS])
    optim, rate, data, losses = config.optim, defaults.schedule(config), Tokens(), []
    named = list(model.named_parameters())
    biases = [p for n, p in named if p.dim() < 2 or n.endswith("_proj_bias")]
    kept = {id(p) for p in biases}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if id(p) not in kept]},
            {"params": biases, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    for step in range(1, STEPS + 1):
        ids = step_sample_ids(config.run.seed, step, config.train.global_batch, SAMPLES)
        total, count = causal_loss(
            model, {"tokens": torch.stack([data[int(i)]["tokens"] for i in ids])}
        )
        optimizer.zero_grad()
        (total / count).backward()
        losses.append(float(total.detach()) / int(count))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        assert norm > optim.clip_norm  # or clipping would not be compared
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * rate(step)
        optimizer.step()
        commit_load(model)  # of adopted layers
    return losses


def transformers_names(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The run's weights by the names of the model of transformers, experts stacked."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, field = name.rpartition(".")
        rows = [f"{path}.lazarus.experts.{e}.{field}" for e in range(len(parameter))]
        if parameter.dim() > 1 and rows[0] in state:
            found[name] = torch.stack([state[row] for row in rows])
        else:
            found[name] = state[name]
    return found


@pytest.mark.parametrize("family", NAMED)
def test_five_steps_with_a_loss_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    own = small_model(family)
    checkpoint = saved(own, tmp_path / "hf")
    losses, state, events = run(tmp_path / "run", checkpoint, "kill:1@3")
    assert [e["node"] for e in events if e["event"] == "node_lost"] == [1]
    assert losses == pytest.approx(alone(own), rel=1e-6)
    for name, tensor in transformers_names(state, own).items():
        assert relative(tensor, own.get_parameter(name)) < 1e-5, name


def test_correction_biases_follow_the_load_of_the_whole_step(tmp_path: Path) -> None:
    own = small_model("deepseek_v3")
    checkpoint = saved(own, tmp_path / "hf")
    losses, state, _ = run(tmp_path / "run", checkpoint, "kill:1@3", bias_rate=0.01)
    assert losses == pytest.approx(alone(adopt(own, bias_rate=0.01)), rel=1e-6)
    biases = {n: b for n, b in own.named_buffers() if n.endswith("e_score_correction_bias")}
    assert biases
    for name, bias in biases.items():
        assert float(bias.abs().max()) > 0
        assert torch.equal(state[name], bias), name


def sole_holder(plan: Mapping[str, Any]) -> int:
    """A node that holds an expert of which there is no other copy."""
    for ranks in plan["experts_of_rank"]:
        for node, held in zip(plan["nodes"], ranks, strict=True):
            if any(sum(e in others for others in ranks) == 1 for e in held):
                return int(node)
    raise AssertionError("every expert has two copies")


def test_experts_that_lost_every_copy_are_read_from_the_folder_again(tmp_path: Path) -> None:
    """No checkpoint was written before, and steps change next to nothing."""
    own = small_model("qwen3_moe")
    where, tokens = str(saved(own, tmp_path / "hf")), Tokens().tokens
    settings = (
        "placement.slots_per_node=2",
        "placement.min_replicas=1",
        "optim.lr=1e-12",
        "checkpoint.full_at_end=true",
    )
    plans: list[Mapping[str, Any]] = []

    def note(run: Watched, event: Mapping[str, Any]) -> None:
        plans.extend([event] if event["event"] == "plan_adopted" else [])

    def lose(run: Watched) -> None:
        run.signal(run.name_of(sole_holder(plans[0])), signal.SIGKILL)

    seen = watch(
        tmp_path / "run",
        nodes=3,
        steps=3000,
        settings=settings,
        acts=[at_step(2, lose), after("expert_restored", action=Watched.stop)],
        on_event=note,
        model=lambda ctx: load(where),
        data=lambda ctx: [{"tokens": row} for row in tokens],
        loss=causal_loss,
    )
    assert {e["source"] for e in seen.of("expert_restored")} == {"initial"}
    state = open_state_dict(str(tmp_path / "run" / "checkpoints"))
    for name, tensor in transformers_names(state, own).items():
        assert relative(tensor, own.get_parameter(name)) < 1e-6, name

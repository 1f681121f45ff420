"""Parameter groups, decay and warm-up of the optimizer of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from any_module import DIM, EXPERTS, AdamW, gelu, replica_of, train
from torch import Tensor, nn

import lazarus
from lazarus.config.train_config import TrainConfig
from lazarus.errors import UserMistakeError
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults


def decayed(replica: Replica) -> dict[str, bool]:
    """Which fields of expert 0 a step without gradients changes."""
    bank = replica.banks[0]
    bank.weight.detach().fill_(1.0)
    train(replica, zero=True)
    views = bank.field_views(bank.weight.detach()[0])
    return {name: not bool((view == 1.0).all()) for name, view in views.items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda groups: AdamW(groups, lr=0.1, weight_decay=0.5, fused=True),
        lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.5),  # decay as a gradient
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_biases_of_experts_are_not_decayed(optimizer: Any) -> None:
    wanted = {"w_in": True, "b_in": False, "w_out": True, "b_out": False}
    assert decayed(replica_of(gelu, optimizer=optimizer)) == wanted


def test_biases_of_experts_train_as_parameters_of_their_own_would() -> None:
    """Three steps with AdamW against one parameter per field, bit for bit; also after growth."""
    replica = replica_of(gelu, optimizer=lambda g: AdamW(g, lr=0.1, weight_decay=0.5))
    bank = replica.banks[0]
    torch.manual_seed(3)
    bank.weight.detach().normal_()
    names = list(bank.layout.fields)

    def cut(rows: Tensor) -> dict[str, Tensor]:
        spans = {
            n: (o, int(np.prod(bank.layout.fields[n]))) for n, o in bank.layout.offsets.items()
        }
        return {n: rows[:EXPERTS, a : a + k].clone() for n, (a, k) in spans.items()}

    own = {n: nn.Parameter(v) for n, v in cut(bank.weight.detach()).items()}
    twin = AdamW(
        [
            {"params": [own[n] for n in names if n.startswith("w_")]},
            {"params": [own[n] for n in names if n.startswith("b_")], "weight_decay": 0.0},
        ],
        lr=0.1, weight_decay=0.5,
    )  # fmt: skip
    for step in range(3):
        if step == 1:
            replica.ensure_slots(EXPERTS + 2)
        assert bank.weight.grad is not None
        bank.weight.grad.normal_()
        for name, part in cut(bank.weight.grad).items():
            own[name].grad = part
        for fields in replica._vectors:
            fields.take(replica.optimizer)
        replica.optimizer.step()
        for fields in replica._vectors:
            fields.give_back(replica.optimizer)
        twin.step()
    moments = cut(replica.optimizer.state[bank.weight]["exp_avg_sq"])
    for name, part in cut(bank.weight.detach()).items():
        assert torch.equal(part, own[name].detach()), name
        assert torch.equal(moments[name], twin.state[own[name]]["exp_avg_sq"]), name


def test_a_model_without_biases_has_no_more_parameters_than_before() -> None:
    groups: list[Any] = []

    def optimizer(given: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        groups[:] = given
        return AdamW(given)

    replica_of(optimizer=optimizer)
    names = {group["name"]: group["names"] for group in groups}
    assert names == {
        "dense": ["embed.weight", "moe.router.weight"],
        "no_decay": ["norm.weight", "norm.bias"],
        "expert": ["moe.experts.weight"],
    }
    replica_of(gelu, optimizer=optimizer)
    (plain,) = (group["names"] for group in groups if group["name"] == "no_decay")
    assert plain == ["norm.weight", "norm.bias", "moe.experts.vectors"]


def test_groups_by_name_and_by_predicate() -> None:
    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rules = [
            ("*.router.weight", {"lr": 0.01}),
            (lambda name, param: param.shape == (12, DIM), {"weight_decay": 0.0}),
        ]
        return AdamW(lazarus.param_groups(groups, rules), lr=0.1, weight_decay=0.5)

    replica = replica_of(optimizer=optimizer)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in replica.optimizer.param_groups
        for name in group["names"]
    }
    assert found == {
        "embed.weight": (0.1, 0.0),
        "moe.router.weight": (0.01, 0.5),
        "norm.weight": (0.1, 0.0),
        "norm.bias": (0.1, 0.0),
        "moe.experts.weight": (0.1, 0.5),
    }
    before = replica.model.embed.weight.clone()
    train(replica, zero=True)
    assert torch.equal(replica.model.embed.weight, before)


def test_a_rule_that_fits_nothing_is_refused() -> None:
    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return AdamW(lazarus.param_groups(groups, [("*.rooter.*", {"lr": 0.01})]))

    with pytest.raises(ValueError, match=r"rule 0 \('\*.rooter.\*'\) fits no parameter"):
        replica_of(optimizer=optimizer)


def test_an_optimizer_without_some_parameters_is_refused_by_name() -> None:
    with pytest.raises(UserMistakeError, match=r"not given norm.weight, norm.bias, which would"):
        replica_of(optimizer=lambda g: AdamW([x for x in g if x["name"] != "no_decay"]))
    more = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserMistakeError, match="parameters that are not in the groups"):
        replica_of(optimizer=lambda g: AdamW([*g, {"params": [more]}]))


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [(30, 60, {1: 1 / 30, 15: 0.5, 30: 1.0}), (100, 60, {60: 0.6}), (0, 60, {1: 1.0})],
)
def test_the_learning_rate_warms_up_as_said(
    warmup: int, steps: int, rates: dict[int, float]
) -> None:
    config = TrainConfig.load(
        overrides=[
            f"optim.warmup_steps={warmup}", f"train.steps={steps}", "optim.schedule=constant",
        ]
    )  # fmt: skip
    rate = defaults.schedule(config)
    assert {step: rate(step) for step in rates} == pytest.approx(rates)

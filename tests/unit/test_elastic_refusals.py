"""What train.elastic_determinism cannot promise is refused with a sentence."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dispatcher import SoloExchange
from dispatcher.layer import compute
from dispatcher.layer.layout import ExpertLayout
from dispatcher.splits.split import SplitRule
from lazarus import MoELayer, TrainConfig
from lazarus.commands.train import _price_of_units
from lazarus.errors import ConfigError, UserMistakeError
from lazarus.runtime.state.buffers import Buffers
from lazarus.runtime.training.self_test import odd_parts, require_equal_bits

SHAPES = [
    ExpertLayout(activation="swiglu", dim=64, hidden=96),
    ExpertLayout(activation="gelu", dim=48, hidden=80, bias=True),
    ExpertLayout(activation="gelu", dim=600, hidden=1100),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_the_same_bits_alone_and_among_others(
    layout: ExpertLayout, dtype: torch.dtype
) -> None:
    began = time.monotonic()
    assert odd_parts(layout, device=CPU, dtype=dtype) == []
    assert time.monotonic() - began < 20.0  # 0.1 s; a shared machine may be busy


def test_the_self_test_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding, products of few rows go through other kernels on this kind of processor."""
    monkeypatch.setattr(compute, "_rows_times", _depends_on_rows)
    odd = odd_parts(SHAPES[0], device=CPU, dtype=torch.float32)
    assert "output of 1 rows" in odd
    assert "gradient of 5 rows" in odd
    layer = MoELayer(dim=64, hidden=96, num_experts=2, top_k=1)
    replica: Any = SimpleNamespace(layers=[layer], device=CPU)
    for is_frozen in (False, True):
        if is_frozen:
            layer.experts.freeze()
        with pytest.raises(UserMistakeError, match="otherwise alone than among others"):
            require_equal_bits(replica, dtype=torch.float32)


def _depends_on_rows(
    a: Any, b: Any, bias: Any, group: Any, *, into: Any, add: bool = False
) -> None:
    rows = a[group.begin : group.end]
    product = (rows @ b) * (1.0 + 1e-6 * len(rows))
    product = product if bias is None else product + bias
    into[group.begin : group.end] = into[group.begin : group.end] + product if add else product


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def test_a_written_mean_is_refused_and_a_counter_is_not() -> None:
    model = Counts()
    buffers = Buffers(model, takes_means=False)
    model.seen += 1  # type: ignore[operator]
    buffers.exchange(SoloExchange(), samples=1, total=1, agree=True)
    model.mean += 1.0  # type: ignore[operator]
    with pytest.raises(UserMistakeError, match="writes buffer mean"):
        buffers.exchange(SoloExchange(), samples=1, total=1, agree=False)


def test_a_mean_that_is_scratch_is_not_refused() -> None:
    model = Counts()
    buffers = Buffers(model, scratch=["mean"], takes_means=False)
    model.mean += 1.0  # type: ignore[operator]
    buffers.exchange(SoloExchange(), samples=1, total=1, agree=True)


@pytest.mark.parametrize("by_source", [False, True])
def test_a_layer_that_runs_twice_is_refused_only_in_the_mode(by_source: bool) -> None:
    layer = MoELayer(dim=8, hidden=16, num_experts=2, top_k=1, balance="none")
    layer.context.rule = SplitRule(mode="home", by_source=by_source)
    x = torch.randn(1, 4, 8)
    for _ in range(2):  # one forward and one backward after another are fine
        layer(x).sum().backward()
    once = layer(x)
    if by_source:
        with pytest.raises(UserMistakeError, match="runs twice in one forward pass"):
            layer(once)
    else:
        layer(once).sum().backward()


def test_a_mode_of_dispatch_that_spreads_is_refused() -> None:
    with pytest.raises(ConfigError, match="spreads an expert's tokens") as refused:
        TrainConfig.load(overrides=["train.elastic_determinism=true", "dispatch.mode=balanced"])
    (problem,) = refused.value.problems
    assert problem.where.startswith("--set dispatch.mode")
    TrainConfig.load(overrides=["train.elastic_determinism=true", "dispatch.mode=home"])


@pytest.mark.parametrize("mode", ["balanced", "shares"])
def test_rows_by_source_need_the_home_mode(mode: str) -> None:
    with pytest.raises(ValueError, match="by_source needs"):
        SplitRule(mode=mode, by_source=True)


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ([], []),
        (["train.global_batch=32"], ["8; times the ideal: 1.12 on 3, 1.00 on 2", "fewer than 4"]),
        (["train.global_batch=64"], ["16; times the ideal: 1.12 on 3, 1.00 on 2, 1.00"]),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_units_cost(settings: list[str], lines: list[str]) -> None:
    mode = ["train.elastic_determinism=true"] if settings else []
    config = TrainConfig.load(overrides=[*mode, *settings, "train.micro_batch_size=4"])
    said = _price_of_units(config, 3)
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert part in line


def test_a_frozen_layer_whose_backward_never_comes_is_no_second_run() -> None:
    layer = MoELayer(dim=8, hidden=16, num_experts=2, top_k=1, balance="none")
    layer.requires_grad_(False)
    layer.context.rule = SplitRule(mode="home", by_source=True)
    for number in range(3):
        layer.context.start_round(step=1, number=number)
        layer(torch.randn(1, 4, 8))


def test_a_mask_of_numbers_is_a_mask() -> None:
    layer = MoELayer(dim=8, hidden=16, num_experts=2, top_k=1, balance="none")
    x, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert torch.equal(layer(x, mask_BS=mask), layer(x, mask_BS=mask.bool()))

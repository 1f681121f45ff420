"""The GPT-MoE: sizes of the named shapes, and a few steps that learn."""

from __future__ import annotations

import pytest
import torch

from lazarus.model import gpt
from lazarus.model.experts import ExpertBank, deferred_experts
from lazarus.model.moe import commit_load, moe_layers, take_auxiliary


def model_parameters(model: torch.nn.Module) -> int:
    """Parameters of the whole model without padding; every expert counts once, held here or not."""
    banks = [m for m in model.modules() if isinstance(m, ExpertBank)]
    inside = {id(bank.weight) for bank in banks}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return dense + sum(bank.num_experts * bank.num_parameters for bank in banks)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt-s", 521_197_824), ("gpt-m", 1_311_788_032), ("gpt-l", 1_714_736_128)],
)
def test_the_named_shapes_have_the_papers_parameters_on_the_meta_device(
    name: str, parameters: int
) -> None:
    with torch.device("meta"):
        model = gpt.build(gpt.GPTConfig.preset(name))
    assert model_parameters(model) == parameters
    assert len(moe_layers(model)) == 12
    assert all(p.is_meta for p in model.parameters())


def test_deferred_experts_take_no_memory_and_count_all_the_same() -> None:
    whole = gpt.build(gpt.GPTConfig.preset("tiny"))
    with deferred_experts():
        empty = gpt.build(gpt.GPTConfig.preset("tiny"))
    assert model_parameters(whole) == model_parameters(empty)
    assert all(m.experts.weight.numel() == 0 for m in moe_layers(empty).values())


def test_a_tiny_model_learns_a_fixed_batch() -> None:
    torch.manual_seed(0)
    model = gpt.build(gpt.GPTConfig.preset("tiny"))
    batch = {"tokens": torch.randint(0, 256, (2, 33))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad(set_to_none=False)
        total, count = gpt.loss(model, batch)
        aux = take_auxiliary(model)
        assert aux is not None
        ((total + aux) / count).backward()
        optimizer.step()
        commit_load(model)
        losses.append(float(total.detach()) / int(count))
    assert losses[-1] < 0.7 * losses[0]
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # log of 256, nearly


def test_recomputation_changes_no_bit() -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = gpt.build(gpt.GPTConfig.preset("tiny"), options=gpt.GPTOptions(recompute=recompute))
        total, _ = gpt.loss(model, {"tokens": torch.arange(66).view(2, 33) % 256})
        total.backward()
        counts = [m.context.counts_E.clone() for m in moe_layers(model).values()]
        results.append((total, [p.grad for p in model.parameters()], counts))
    (loss_a, grads_a, counts_a), (loss_b, grads_b, counts_b) = results
    assert torch.equal(loss_a, loss_b)
    assert all(torch.equal(a, b) for a, b in zip(counts_a, counts_b, strict=True))
    for a, b in zip(grads_a, grads_b, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_attention_under_autocast_is_that_of_fp32_to_the_precision_of_its_input() -> None:
    torch.manual_seed(2)
    attention = gpt.Attention(64, 4)
    x_BSD = torch.randn(2, 40, 64)
    exact = attention(x_BSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attention(x_BSD)
    low.float().square().sum().backward()
    assert low.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(low.float() - exact) < 0.02 * torch.linalg.vector_norm(exact)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())

"""Gates, permutations, layouts and the experts' arithmetic, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher.gating import choose_experts, gate_scores, top_experts
from dispatcher.layer.compute import (
    MIN_ROWS,
    Saved,
    arithmetic_dtype,
    experts_backward,
    experts_forward,
    groups_of,
)
from dispatcher.layer.layout import ROW_MULTIPLE, ExpertLayout
from dispatcher.layer.permute import expert_order, inverse_order, send_order, transposed_index
from dispatcher.reference import expert_output

CPU = torch.device("cpu")


@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_equal_scores_go_to_the_lower_expert(top_k: int) -> None:
    scores = torch.tensor([[0.5] * 8, [0.1, 0.9, 0.2, 0.9, 0.2, 0.9, 0.1, 0.2]])
    chosen = top_experts(scores, top_k=top_k)
    assert chosen[0].tolist() == list(range(top_k))
    assert chosen[1].tolist() == [1, 3, 5, 2, 4, 7][:top_k]


def test_weights_are_scores_renormalised_and_scaled_and_the_bias_only_chooses() -> None:
    scores = gate_scores(torch.tensor([[0.0, 1.0, 2.0]]), score="sigmoid")
    bias = torch.tensor([5.0, 0.0, 0.0])
    chosen, weight = choose_experts(scores, top_k=2, bias_E=bias, renormalize=True, scale=2.5)
    assert chosen.tolist() == [[0, 2]]
    assert weight.sum().item() == pytest.approx(2.5)
    assert (weight[0, 0] / weight[0, 1]).item() == pytest.approx(
        (scores[0, 0] / scores[0, 2]).item()
    )


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown score 'tanh'"):
        gate_scores(torch.zeros(1, 2), score="tanh")  # type: ignore[arg-type]


def test_send_order_sorts_by_target_expert_and_arrival() -> None:
    random = np.random.default_rng(0)
    expert = torch.from_numpy(random.integers(-1, 5, size=60))
    counts = np.bincount(expert[expert >= 0], minlength=5)
    first = random.integers(0, counts + 1)
    send = np.stack([first, counts - first])  # two targets
    sent = send_order(expert_order(expert, num_experts=5), send)
    slow = []
    for target in range(2):
        for e in range(5):
            copies = np.flatnonzero(expert.numpy() == e)
            slow += list(copies[: first[e]] if target == 0 else copies[first[e] :])
    assert sent.tolist() == slow
    position = inverse_order(sent, num_copies=60)
    assert (position[sent] == torch.arange(sent.numel())).all()
    assert (position[expert < 0] == sent.numel()).all()


def test_transposing_segments_and_back_is_the_identity() -> None:
    lengths = np.array([[2, 0, 3], [1, 4, 0]])
    rows = torch.arange(10)
    there = transposed_index(lengths, device=CPU)
    back = transposed_index(np.ascontiguousarray(lengths.T), device=CPU)
    assert there is not None
    assert back is not None
    assert rows[there].tolist() == [0, 1, 5, 6, 7, 8, 9, 2, 3, 4]
    assert torch.equal(rows[there][back], rows)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_rows_start_on_cache_lines_and_fields_are_views(activation: str) -> None:
    layout = ExpertLayout(activation=activation, dim=3, hidden=5)  # type: ignore[arg-type]
    row = torch.arange(float(layout.row_numel))
    assert layout.row_numel % ROW_MULTIPLE == 0
    fields = layout.views(row)
    assert torch.cat([f.reshape(-1) for f in fields.values()]).equal(row[: layout.num_parameters])


def bank(layout: ExpertLayout, *, seed: int) -> Tensor:
    return torch.randn(3, layout.row_numel, generator=torch.Generator().manual_seed(seed)) / 4


@pytest.mark.parametrize("shape", ["gelu", "gelu_bias", "swiglu"])
@pytest.mark.parametrize("rows", [(1, 0, 2), (15, 16, 17), (40, 1, 0), (0, 0, 0)])
def test_experts_equal_their_slow_twin(shape: str, rows: tuple[int, ...]) -> None:
    layout = ExpertLayout(
        activation="swiglu" if shape == "swiglu" else "gelu",
        dim=24,
        hidden=40,
        bias=shape == "gelu_bias",
    )
    weight = bank(layout, seed=1)
    x, upstream = torch.randn(2, sum(rows), 24)
    groups = groups_of([2, 0, 1], rows)
    y, hidden = experts_forward(x, weight, groups, layout)
    grad = torch.ones_like(weight)
    grad_x = experts_backward(upstream.clone(), Saved(x, hidden), weight, grad, groups, layout)
    again = torch.ones_like(weight)
    same_x = experts_backward(upstream.clone(), Saved(x, ()), weight, again, groups, layout)
    assert torch.equal(grad, again)
    assert torch.equal(grad_x, same_x)
    leaf, x_leaf = weight.double().requires_grad_(), x.double().requires_grad_()
    slow = [
        expert_output(
            x_leaf[g.begin : g.end], layout.views(leaf[g.slot]), activation=layout.activation
        )
        for g in groups
    ]
    if slow:
        torch.testing.assert_close(y.double(), torch.cat(slow), rtol=1e-5, atol=1e-5)
        (torch.cat(slow) * upstream).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(grad_x.double(), x_leaf.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((grad - 1).double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_were_cast_serve_the_backward_too(dtype: torch.dtype) -> None:
    layout = ExpertLayout(activation="gelu", dim=24, hidden=40, bias=True)
    weight, groups = bank(layout, seed=3), groups_of([1, 0], [20, 30])
    x, upstream = torch.randn(2, 50, 24).to(dtype)
    kept, again = Saved(x, ()), Saved(x, ())
    _, kept.hidden = experts_forward(x, weight, groups, layout, cast=kept.weights)
    casts = arithmetic_dtype(x) != weight.dtype
    assert len(kept.weights) == (len(groups) if casts else 0)
    grads = []
    for saved in (kept, again):
        grad = torch.zeros_like(weight)
        rows = experts_backward(upstream.clone(), saved, weight, grad, groups, layout)
        grads.append((rows, grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a rank: with two threads MKL divides a product's rows by their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("dim", "hidden"), [(256, 1024), (12, 20), (64, 128), (100, 72)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_rows_bits_do_not_depend_on_its_company(activation: str, dim: int, hidden: int) -> None:
    layout = ExpertLayout(activation=activation, dim=dim, hidden=hidden)  # type: ignore[arg-type]
    weight, other = bank(layout, seed=2), torch.empty(7, layout.row_numel)
    other[5] = weight[0]
    x, upstream = torch.randn(2, 300, dim)
    full, _ = experts_forward(x, weight, groups_of([0], [300]), layout)
    hidden_full = experts_forward(x, weight, groups_of([0], [300]), layout)[1]
    back = experts_backward(
        upstream.clone(), Saved(x, hidden_full), weight, None, groups_of([0], [300]), layout
    )
    for begin, count in [
        (0, 1),
        (7, 2),
        (11, 3),
        (3, MIN_ROWS - 1),
        (5, MIN_ROWS),
        (1, 33),
        (9, 257),
    ]:
        part = x[begin : begin + count].clone()
        groups = groups_of([5], [count])
        y, hidden_part = experts_forward(part, other, groups, layout)
        assert torch.equal(y, full[begin : begin + count])
        grad = upstream[begin : begin + count].clone()
        grad_x = experts_backward(grad, Saved(part, hidden_part), other, None, groups, layout)
        assert torch.equal(grad_x, back[begin : begin + count])


def test_swiglu_has_no_biases() -> None:
    with pytest.raises(ValueError, match="swiglu experts have no biases"):
        ExpertLayout(activation="swiglu", dim=4, hidden=4, bias=True)

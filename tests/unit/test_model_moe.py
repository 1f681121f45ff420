"""The MoE layer alone: gates, masks, balancing, shared experts, precision, traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import Dispatcher, DispatchInputError, Exchange, RoutingTable, run_ranks
from dispatcher.reference import dense_moe
from dispatcher.trace import RoutingRecord, TraceError, counts_of, read_trace, replay, write_trace
from lazarus.model.balance import auxiliary_sum, expected_fractions, updated_bias
from lazarus.model.experts import ExpertBank, deferred_experts
from lazarus.model.moe import MoELayer, commit_load, take_auxiliary


def layer_of(**settings: object) -> MoELayer:
    torch.manual_seed(5)
    base: dict[str, object] = {"dim": 16, "hidden": 24, "num_experts": 6, "top_k": 2}
    return MoELayer(**(base | settings))  # type: ignore[arg-type]


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(6))


def dense_twin(layer: MoELayer, x: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    fields = [layer.experts.field_views(row) for row in layer.experts.weight]
    flat = x.reshape(-1, 16)
    return dense_moe(
        flat, expert_TK, gate_TK, fields, activation=layer.experts.layout.activation
    ).view_as(x)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_layer_is_its_experts_weighed_by_the_router(score: str, renormalize: bool) -> None:
    layer = layer_of(score=score, renormalize=renormalize, score_scale=1.5)
    x = tokens()
    logits = x.reshape(-1, 16) @ layer.router.weight.t()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    gate, choice = scores.topk(2)
    gate = 1.5 * (gate / gate.sum(-1, keepdim=True) if renormalize else gate)
    torch.testing.assert_close(layer(x), dense_twin(layer, x, choice, gate), rtol=1e-5, atol=1e-6)


def test_masked_tokens_are_neither_routed_nor_counted() -> None:
    layer = layer_of()
    x = tokens()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, :4] = True
    y = layer(x, mask_BS=mask)
    assert int(layer.context.counts_E.sum()) == 4 * 2
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], layer_of()(x)[mask])
    half, whole = take_auxiliary(layer), layer_of()
    whole(x[:1, :4])
    expected = take_auxiliary(whole)
    assert half is not None
    assert expected is not None
    torch.testing.assert_close(half, expected)


def test_the_auxiliary_loss_is_a_sum_over_tokens_whatever_the_split() -> None:
    scores = torch.rand(10, 4).softmax(-1)
    fractions = torch.tensor([0.4, 0.3, 0.2, 0.1])
    whole = auxiliary_sum(scores, fractions, coefficient=0.01, score="softmax")
    parts = [
        auxiliary_sum(part, fractions, coefficient=0.01, score="softmax")
        for part in scores.split([1, 6, 3])
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
    slow = 0.01 * 4 * (fractions * scores.mean(0)).sum() * 10
    torch.testing.assert_close(whole, slow)


def test_fractions_and_biases_come_from_committed_counts() -> None:
    counts = torch.tensor([30, 10, 20, 20])
    assert expected_fractions(counts).tolist() == pytest.approx([0.375, 0.125, 0.25, 0.25])
    assert expected_fractions(torch.zeros(4, dtype=torch.int64)).tolist() == [0.25] * 4
    bias = updated_bias(torch.zeros(4), counts, rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_bias_balancing_evens_the_load_without_a_loss_and_is_state() -> None:
    layer = layer_of(balance="bias", top_k=1)
    assert "router_bias" in layer.state_dict()
    x = torch.randn(1, 400, 16) + 1.0  # a common direction: some experts are far too popular

    def skew() -> float:
        layer(x)
        load = layer.context.counts_E.double()
        return float(load.max() / load.mean())

    before = skew()
    for _ in range(60):
        commit_load(layer, bias_rate=0.02)
        after = skew()
    assert take_auxiliary(layer) is None
    assert after < 1.3 < before


def test_shared_experts_see_every_token() -> None:
    layer = layer_of(num_shared=2)
    x = tokens()
    assert layer.shared is not None
    alone = layer_of()
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if "shared" not in k})
    torch.testing.assert_close(layer(x), alone(x) + layer.shared(x))


def test_recomputing_inside_a_checkpoint_counts_once_and_changes_no_bit() -> None:
    from torch.utils.checkpoint import checkpoint

    plain, repeated = layer_of(), layer_of(recompute=True)
    x1, x2 = (tokens().requires_grad_() for _ in range(2))
    plain(x1).square().sum().backward()
    checkpoint(repeated, x2, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain.context.counts_E, repeated.context.counts_E)
    assert x1.grad is not None
    assert x2.grad is not None
    assert torch.equal(x1.grad, x2.grad)
    for a, b in zip(plain.parameters(), repeated.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


class Dtypes:
    """An exchange of one that notes what is sent."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.sent: dict[str, torch.dtype] = {}
        self.inner = run_ranks(lambda e: e, size=1)[0]

    def all_to_all(self, output: Tensor, input: Tensor, *, label: str, **splits) -> None:  # type: ignore[no-untyped-def]
        self.sent[label] = input.dtype
        self.inner.all_to_all(output, input, label=label, **splits)

    def start_all_reduce(self, tensor: Tensor, *, label: str):  # type: ignore[no-untyped-def]
        return self.inner.start_all_reduce(tensor, label=label)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_bf16_autocast_sends_bf16_keeps_fp32_sums_and_stays_close(activation: str) -> None:
    exact, coarse = layer_of(activation=activation), layer_of(activation=activation)
    watch = Dtypes()
    coarse.context.exchange = watch  # type: ignore[assignment]
    x = tokens(4, 40)
    y = exact(x)
    y.square().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = coarse(x)
    rough.float().square().sum().backward()
    assert set(watch.sent.values()) == {torch.bfloat16}
    assert set(watch.sent) == {"dispatch", "combine", "combine_grad", "dispatch_grad"}
    scale = float(y.detach().abs().max())
    assert float((rough - y).detach().abs().max()) < 0.03 * scale
    grad, rough_grad = exact.experts.weight.grad, coarse.experts.weight.grad
    assert grad is not None
    assert rough_grad is not None
    assert rough_grad.dtype == torch.float32
    assert float((grad - rough_grad).norm() / grad.norm()) < 0.03


def test_a_seeded_build_gives_the_same_experts_deferred_or_not() -> None:
    whole = layer_of()
    torch.manual_seed(5)
    with deferred_experts():
        empty = MoELayer(dim=16, hidden=24, num_experts=6, top_k=2)
    assert empty.experts.weight.numel() == 0
    assert torch.equal(whole.router.weight, empty.router.weight)
    empty.experts.allocate(num_slots=2, device="cpu")
    empty.experts.assign(1, 4)
    empty.experts.initialise(1)
    assert torch.equal(empty.experts.weight[1], whole.experts.row(4))
    with pytest.raises(ValueError, match="expert 4 already lives in another slot"):
        empty.experts.assign(0, 4)
    with pytest.raises(KeyError, match="expert 2 is not held here"):
        empty.experts.row(2)


def test_a_bank_of_the_meta_device_is_filled_when_it_gets_memory() -> None:
    torch.manual_seed(7)
    with torch.device("meta"):
        bank = ExpertBank(dim=8, hidden=8, num_experts=3)
    torch.manual_seed(7)
    real = ExpertBank(dim=8, hidden=8, num_experts=3)
    assert torch.equal(bank.to_empty(device="cpu").weight, real.weight)


@pytest.mark.parametrize("top_k", [0, 7])
def test_an_impossible_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k={top_k} must lie in 1\.\.6"):
        layer_of(top_k=top_k)


def test_a_trace_written_by_a_layer_is_replayed_through_the_dispatcher(tmp_path: Path) -> None:
    layer = layer_of()
    records: list[RoutingRecord] = []
    layer.context.observer = lambda number, chosen: records.append(
        RoutingRecord(step=3, layer=number, rank=len(records), expert_TK=chosen)
    )
    layer(tokens())
    layer(tokens(1, 5))
    path = tmp_path / "trace.jsonl"
    assert write_trace(path, records) == 2
    first = path.read_text().splitlines()[0]
    assert first.startswith('{"step":3,"layer":0,"rank":0,"num_tokens":18,"topk":2,"top_indices":')
    back = list(read_trace(path))
    assert all(torch.equal(a.expert_TK, b.expert_TK) for a, b in zip(records, back, strict=True))
    counts = counts_of(back, num_ranks=2, num_experts=6)
    assert (counts.sum(0) == layer.context.counts_E.numpy()).all()

    def body(exchange: Exchange) -> list[int]:
        table = RoutingTable.from_plan_arrays([[0, 1, 2], [3, 4, 5]], rank=exchange.rank)
        dispatcher = Dispatcher(table, exchange=exchange)
        return [d.rows_MD.shape[0] for d in replay(back, dispatcher, dim=4)]

    served = [sum(rows) for rows in run_ranks(body, size=2)]
    assert served == [counts[:, :3].sum(), counts[:, 3:].sum()]
    forced = layer_of()
    forced.context.forced_TK = back[0].expert_TK
    assert torch.equal(forced(tokens()), layer_of()(tokens()))


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_replayed_copy_that_went_nowhere_adds_nothing(renormalize: bool) -> None:
    layer = layer_of(renormalize=renormalize, balance="none")
    chosen = torch.tensor([[0, 3], [-1, 2], [4, -1], [-1, -1], [5, 1], [2, 0]])
    layer.context.forced_TK = chosen
    x = tokens(1, 6).requires_grad_()
    y = layer(x)
    assert not y[0, 3].any()
    score = torch.softmax(layer.router(x[0]), dim=-1)
    gate = score.gather(1, chosen.clamp_min(0)) * (chosen >= 0)
    if renormalize:
        gate = gate / gate.sum(-1, keepdim=True).clamp_min(1e-20)
    torch.testing.assert_close(y, dense_twin(layer, x, chosen, gate), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert x.grad is not None
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.isfinite().all()
    assert x.grad[0, [0, 1, 2, 4, 5]].any(dim=-1).all()
    assert not x.grad[0, 3].any()


def test_a_replayed_id_out_of_range_is_refused_with_its_range() -> None:
    layer = layer_of()
    layer.context.forced_TK = torch.tensor([[0, 6], [1, 2]])
    with pytest.raises(DispatchInputError, match=r"out of range.*ids 0\.\.6"):
        layer(tokens(1, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:1: not JSON"),
        ('{"step": 1}', "trace.jsonl:1: no 'layer'"),
        (
            '{"step":0,"layer":0,"rank":0,"num_tokens":2,"topk":1,"top_indices":[[0]]}',
            "top_indices are not 2 x 1",
        ),
        (
            '{"step":0,"layer":0,"rank":0,"num_tokens":null,"topk":1,"top_indices":[[0]]}',
            "trace.jsonl:1: num_tokens is None, not an integer",
        ),
        (
            '{"step":0,"layer":"x","rank":0,"num_tokens":1,"topk":1,"top_indices":[[0]]}',
            "trace.jsonl:1: layer is 'x', not an integer",
        ),
        (
            '{"step":0,"layer":0,"rank":0,"num_tokens":-1,"topk":1,"top_indices":[[0]]}',
            "trace.jsonl:1: -1 tokens of 1 choices",
        ),
        (
            '{"step":0,"layer":0,"rank":0,"num_tokens":1,"topk":-1,"top_indices":[[0]]}',
            "trace.jsonl:1: 1 tokens of -1 choices",
        ),
    ],
)
def test_a_broken_trace_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TraceError, match=message):
        list(read_trace(path))


def test_counts_of_a_stranger_trace_are_refused() -> None:
    record = RoutingRecord(step=1, layer=0, rank=0, expert_TK=torch.tensor([[9]]))
    with pytest.raises(TraceError, match="expert 9 of 4"):
        counts_of([record], num_ranks=1, num_experts=4)
    assert counts_of([], num_ranks=1, num_experts=4).tolist() == [[0, 0, 0, 0]]
    assert np.asarray(record.expert_TK).shape == (1, 1)

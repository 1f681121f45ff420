"""Banks of experts: kinds, sources, frozen tensors, and what a model's builder writes to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dispatcher import ExpertLayout, RoutingTable, TensorLayout, run_ranks
from lazarus.errors import UserMistakeError
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank, deferred_experts
from lazarus.model.moe import MoELayer
from lazarus.model.protocol import ElasticLayer, checked_layers, moe_layers
from lazarus.model.routed import RoutedExperts
from lazarus.runtime.state.groups import VectorFields

LAYOUT = TensorLayout({"up": (8, 12), "up_bias": (12,), "down": (12, 8)}, dim=8)


def run(rows: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    return torch.relu(rows @ fields["up"] + fields["up_bias"]) @ fields["down"]


def source(expert: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(expert)
    return {
        name: torch.randn(shape, generator=random).bfloat16()
        for name, shape in (LAYOUT.fields | ADAPTERS.fields).items()
    }


ADAPTERS = TensorLayout({"a": (8, 2), "b": (2, 8)}, dim=8)


def filled(bank: ExpertBank, experts: list[int]) -> ExpertBank:
    """What the runtime does: slots, experts, initial values."""
    bank.allocate(num_slots=len(experts), device="cpu")
    for slot, expert in enumerate(experts):
        bank.assign(slot, expert)
        bank.initialise(slot)
    return bank


def test_experts_come_from_their_source_when_a_slot_is_filled() -> None:
    asked: list[int] = []

    def noted(expert: int) -> dict[str, Tensor]:
        asked.append(expert)
        return source(expert)

    with deferred_experts():
        bank = ExpertBank.of(
            ADAPTERS, num_experts=6, source=noted, frozen_layout=LAYOUT,
            frozen_dtype=torch.bfloat16,
        )  # fmt: skip
    assert asked == []
    filled(bank, [4, 1])
    assert asked == [4, 1]
    assert bank.weight.shape == (2, ADAPTERS.row_numel)
    assert bank.frozen is not None
    assert bank.frozen.dtype == torch.bfloat16
    assert not bank.frozen.requires_grad
    assert list(bank.fields) == ["a", "b", "up", "up_bias", "down"]
    assert bank.num_parameters == ADAPTERS.num_parameters + LAYOUT.num_parameters
    for slot, expert in enumerate((4, 1)):
        values, given = bank.values(slot), source(expert)
        assert all(torch.equal(values[name].float(), given[name].float()) for name in bank.fields)


def test_a_source_that_does_not_fit_is_refused_with_its_names() -> None:
    with pytest.raises(
        UserMistakeError, match=r"source of expert 0 gives down: None, wanted \(12, 8\)"
    ):
        ExpertBank.of(LAYOUT, num_experts=2, source=lambda e: {"up": torch.ones(8, 12)})
    with pytest.raises(ValueError, match=r"overlap in \['up'\]"):
        ExpertBank.of(LAYOUT, num_experts=2, frozen_layout=TensorLayout({"up": (8, 12)}, dim=8))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_bank_computes_the_same_and_gets_no_gradient(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = MoELayer(dim=8, hidden=12, num_experts=4, top_k=2, activation="gelu", bias=True)
    twin = copy.deepcopy(layer)
    layer.experts.freeze(dtype=dtype)
    assert layer.experts.is_frozen
    assert layer.experts.weight.shape == (4, 0)
    assert isinstance(layer.experts.frozen_layout, ExpertLayout)
    if dtype is not None:
        twin.experts.weight.data = twin.experts.weight.data.to(dtype).float()
    found = []
    for one in (layer, twin):
        x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        one(x).square().sum().backward()
        assert x.grad is not None
        assert one.router.weight.grad is not None
        found.append((x.grad, one.router.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    frozen = layer.experts.frozen
    assert frozen is not None
    assert frozen.grad is None
    assert not any(p.requires_grad for p in layer.experts.parameters())


def test_freezing_a_bank_with_frozen_tensors_keeps_all_values() -> None:
    bank = ExpertBank.of(ADAPTERS, num_experts=3, source=source, frozen_layout=LAYOUT)
    before = [{n: v.clone() for n, v in bank.values(slot).items()} for slot in range(3)]
    bank.freeze()
    for slot in range(3):
        after = bank.values(slot)
        assert all(torch.equal(after[name], before[slot][name]) for name in before[slot])
    bank.freeze()
    assert list(bank.fields) == list(before[0])


def test_a_bank_that_the_builder_froze_is_allocated_frozen() -> None:
    torch.manual_seed(1)
    whole = MoELayer(dim=8, hidden=12, num_experts=4, top_k=2)
    torch.manual_seed(1)
    with deferred_experts():
        layer = MoELayer(dim=8, hidden=12, num_experts=4, top_k=2)
        layer.experts.requires_grad_(False)
    bank = filled(layer.experts, [2, 3])
    assert bank.is_frozen
    assert bank.weight.grad is None
    assert not bank.weight.requires_grad
    assert torch.equal(bank.values(0)["w_up"], whole.experts.values(2)["w_up"])


BUILDERS = {
    "nothing": lambda bank: None,
    "an initialiser": lambda bank: nn.init.normal_(bank.weight, std=0.1),
    "data": lambda bank: bank.weight.data.copy_(torch.ones(4, bank.layout.row_numel)),
    "one row": lambda bank: bank.row(2).data.fill_(3.0),
    "one field": lambda bank: bank.field_views(bank.weight.detach()[3])["w_up"].fill_(7.0),
    "every parameter": lambda bank: [p.data.mul_(0.5) for p in bank.parameters()],
    "a parameter": lambda bank: setattr(
        bank, "weight", nn.Parameter(torch.ones(4, bank.layout.row_numel))
    ),
    "a state dict": lambda bank: bank.load_state_dict(
        {"weight": torch.ones(4, bank.layout.row_numel)}
    ),
}


@pytest.mark.parametrize("how", BUILDERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_builder_writes_to_experts_is_their_initial_value(how: str, frozen: bool) -> None:
    banks = []
    for defers in (False, True):
        torch.manual_seed(2)
        if defers:
            with deferred_experts():
                bank = ExpertBank(dim=8, hidden=12, num_experts=4)
                with torch.no_grad():
                    BUILDERS[how](bank)
            if frozen:
                bank.requires_grad_(False)
            bank = copy.deepcopy(bank).to("cpu")
            filled(bank, [3, 2, 0])
        else:
            bank = ExpertBank(dim=8, hidden=12, num_experts=4)
            with torch.no_grad():
                BUILDERS[how](bank)
        banks.append(bank)
    whole, part = banks
    for slot, expert in enumerate(part.expert_of_slot):
        ours, theirs = part.values(slot), whole.values(expert)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_looking_at_a_deferred_bank_costs_no_memory() -> None:
    with deferred_experts():
        model = nn.Sequential(MoELayer(dim=8, hidden=12, num_experts=4, top_k=1))
        sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype.is_floating_point)
        model.train().to("cpu").requires_grad_(True)
        copies = copy.deepcopy(model)
    for one in (model, copies):
        bank = one[0].experts
        assert isinstance(bank, ExpertBank)
        assert bank.weight.shape[0] == 0
        filled(bank, [1])
    assert torch.equal(model[0].experts.weight, copies[0].experts.weight)


def test_rows_of_another_size_are_refused() -> None:
    with deferred_experts():
        bank = ExpertBank(dim=8, hidden=12, num_experts=4)
        bank.weight = nn.Parameter(torch.zeros(3, bank.layout.row_numel))
    with pytest.raises(UserMistakeError, match=r"experts.weight is \(3, 288\), not \(4, 288\)"):
        bank.allocate(num_slots=1, device="cpu")


def test_layers_are_found_by_what_they_have_not_by_their_class() -> None:
    class Own(nn.Module):
        num_experts, top_k, bias_rate, router_bias = 4, 1, 0.0, None

        def __init__(self) -> None:
            super().__init__()
            self.experts = ExpertBank.of(LAYOUT, num_experts=4)
            self.context = LayerContext.solo(4)

        def attach(self, context: LayerContext | None) -> None:
            self.context = context or LayerContext.solo(4)

    model = nn.ModuleDict({"a": Own(), "b": MoELayer(dim=8, hidden=8, num_experts=4, top_k=1)})
    assert list(moe_layers(model)) == ["a", "b"]
    assert all(isinstance(layer, ElasticLayer) for layer in checked_layers(model).values())
    model["b"].experts = model["a"].experts
    with pytest.raises(UserMistakeError, match="layers a and b share their experts"):
        checked_layers(model)
    tied = nn.ModuleList(MoELayer(dim=8, hidden=8, num_experts=4, top_k=1) for _ in range(2))
    tied[1].experts.weight = tied[0].experts.weight
    with pytest.raises(UserMistakeError, match="layers 0 and 1 share their experts"):
        checked_layers(tied)
    stray = nn.ModuleDict({"a": Own(), "pool": ExpertBank.of(LAYOUT, num_experts=4)})
    with pytest.raises(UserMistakeError, match="the experts at pool belong to no layer"):
        checked_layers(stray)


def test_experts_without_a_router_are_the_sum_of_their_choices_on_any_ranks() -> None:
    torch.manual_seed(3)
    x = torch.randn(12, 8)
    gate, choice = torch.rand(12, 4).topk(2)
    mask = torch.arange(12) % 5 != 0
    fields = [source(expert) for expert in range(4)]
    expected = torch.zeros(12, 8)
    for token in mask.nonzero()[:, 0].tolist():
        for k in range(2):
            given = {n: v.float() for n, v in fields[int(choice[token, k])].items()}
            expected[token] += gate[token, k] * run(x[token : token + 1], given)[0]

    def body(exchange) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        table = RoutingTable.from_plan_arrays([[0, 1, 2], [2, 3, -1]], rank=exchange.rank)
        slots = [e for e in table.slots_of(exchange.rank) if e >= 0]
        with deferred_experts():
            bank = ExpertBank.of(
                TensorLayout({}, dim=8), num_experts=4, frozen_layout=LAYOUT,
                source=lambda e: {n: source(e)[n] for n in LAYOUT.fields},
            )  # fmt: skip
        layer = RoutedExperts(filled(bank, slots), top_k=2, run=run)
        layer.attach(LayerContext(layer=0, exchange=exchange, table=table))
        layer.context.anchors = []
        layer.context.ghost = exchange.rank == 1
        rows = x.clone().requires_grad_()
        y = layer(rows, choice, gate, mask_T=mask)
        y.sum().backward()
        assert rows.grad is not None
        assert layer.context.counts_E.sum() == 2 * int(mask.sum())
        assert len(layer.context.take_anchors()) == 1
        return y.detach(), rows.grad

    (y, grad), (nothing, no_grad) = run_ranks(body, size=2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert grad[mask].any()
    assert not grad[~mask].any()
    assert not nothing.any()
    assert not no_grad.any()


def test_a_layer_that_was_trained_before_the_run_keeps_its_experts() -> None:
    layer = MoELayer(dim=8, hidden=12, num_experts=4, top_k=2)
    with torch.no_grad():
        layer.experts.weight.mul_(3.0)
    layer(torch.randn(1, 5, 8)).sum()
    before = layer.experts.weight.detach().clone()
    with deferred_experts():  # a run pickles the model that it is given
        came = pickle.loads(pickle.dumps(layer))  # noqa: S301 - written here
    bank = filled(came.experts, [3, 1])
    for slot, expert in enumerate((3, 1)):
        for name, value in layer.experts.layout.views(before[expert]).items():
            assert torch.equal(bank.values(slot)[name], value)


@pytest.mark.parametrize("seed", range(20))
def test_an_experts_vectors_get_the_same_bits_in_every_slot(seed: int) -> None:
    """25 numbers a slot: without padding, a fused optimizer treats the last of them differently."""
    torch.manual_seed(seed)
    layout = TensorLayout({"w": (32, 24), "bias": (24,), "scale": ()}, dim=32)
    bank = ExpertBank.of(layout, num_experts=7, source=lambda e: layout.views(torch.zeros(800)))
    vectors = VectorFields(bank)
    optimizer = torch.optim.AdamW(
        [{"params": [bank.weight]}, {"params": [vectors.parameter], "weight_decay": 0.0}],
        lr=0.003, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    for _ in range(3):
        bank.weight.grad = (torch.randn(layout.row_numel) * 1e-3).expand(7, -1).clone()
        vectors.take(optimizer)
        optimizer.step()
        vectors.give_back(optimizer)
    assert all(torch.equal(bank.weight[0], other) for other in bank.weight)
    assert bank.weight.any()


def test_a_builder_may_write_to_frozen_tensors_too() -> None:
    with deferred_experts():
        bank = ExpertBank.of(
            ADAPTERS, num_experts=3, frozen_layout=LAYOUT, frozen_dtype=torch.bfloat16
        )
        assert bank.frozen is not None
        with torch.no_grad():
            nn.init.constant_(bank.frozen, 0.5)
        copied = copy.deepcopy(bank)
    for one in (bank, copied):
        filled(one, [2])
        assert one.frozen is not None
        assert one.frozen.dtype == torch.bfloat16
        assert not one.frozen.requires_grad
        assert all(bool((one.values(0)[name] == 0.5).all()) for name in LAYOUT.fields)
        assert one.values(0)["a"].any()
        one.freeze()
        assert list(one.fields) == ["a", "b", "up", "up_bias", "down"]
    assert torch.equal(bank.values(0)["a"], copied.values(0)["a"])

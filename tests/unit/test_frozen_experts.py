"""Experts whose weights the builder sets, and experts that are not trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from any_module import DIM, EXPERTS, TAG, Tied, gelu, replica_of, stored, train
from safetensors.torch import load_file
from torch import Tensor, nn

from dispatcher import TensorLayout
from lazarus import MoELayer
from lazarus.checkpoint.files.export import export
from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.store import (
    RecordKey,
    commit_manifest,
    find_checkpoints,
    load_manifest,
    write_files,
)
from lazarus.checkpoint.files.tensors import record_of
from lazarus.checkpoint.format.manifest import LayerEntry
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.checkpoint.selection.saving import plan_save
from lazarus.checkpoint.selection.schedule import Selection
from lazarus.errors import CheckpointError, UserMistakeError
from lazarus.model.experts import ExpertBank
from lazarus.model.routed import RoutedExperts
from lazarus.run.resume_point import lost_until
from lazarus.runtime.saving.final_checkpoint import share_report
from lazarus.runtime.saving.rollback_state import read_base
from lazarus.runtime.state.banks import arrange
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.step import Step

# ---- experts: values of the builder, frozen ------------------------------------------------------


def filled() -> nn.Module:
    """Experts whose weights the builder sets, each in another way."""
    model = Tied(activation="gelu", bias=True)
    bank = model.moe.experts
    with torch.no_grad():
        bank.field_views(bank.row(1))["b_in"].fill_(1.0)
        bank.weight[2] = 2.0
        bank.weight.data[3].fill_(3.0)
    return model


def rows(replica: Replica) -> Tensor:
    bank = replica.banks[0]
    return torch.stack([bank.row(expert).detach() for expert in range(EXPERTS)])


def test_weights_of_experts_set_by_the_builder_are_their_initial_values() -> None:
    replica, plain = replica_of(filled), replica_of(gelu)
    assert bool((replica.banks[0].field_views(rows(replica)[2])["w_in"] == 2.0).all())
    fields = replica.banks[0].field_views(rows(replica)[1])
    assert bool((fields["b_in"] == 1.0).all())
    assert torch.equal(fields["w_in"], replica.banks[0].field_views(rows(plain)[1])["w_in"])
    assert torch.equal(rows(replica)[0], rows(plain)[0])  # as drawn
    assert bool((replica.banks[0].field_views(rows(replica)[3])["w_out"] == 3.0).all())


def test_a_state_dict_loaded_by_the_builder_is_the_start_of_a_run(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    first = replica_of(seed=1)
    train(first, steps=2)
    stored(url, first)
    export(url, str(tmp_path / "model.safetensors"))

    def build() -> nn.Module:
        model = Tied()
        model.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
        return model

    second = replica_of(build, seed=2)
    assert torch.equal(rows(second), rows(first))
    assert torch.equal(second.flat, first.flat)


def test_a_model_built_before_the_run_keeps_its_experts() -> None:
    torch.manual_seed(5)
    model = Tied()
    wanted = model.moe.experts.weight.detach().clone()
    assert torch.equal(rows(replica_of(lambda: model)), wanted)


class TwoLayers(nn.Module):
    """The first layer's experts are frozen, those of the second are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, DIM)
        self.base = MoELayer(dim=DIM, hidden=16, num_experts=EXPERTS, top_k=2)
        self.base.experts.weight.requires_grad_(False)
        self.moe = MoELayer(dim=DIM, hidden=24, num_experts=EXPERTS, top_k=2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.base(x[None])[0]
        return x + self.moe(x[None])[0]


def test_frozen_experts_are_weights_alone_and_stay_as_they_are() -> None:
    replica = replica_of(TwoLayers)
    frozen = replica.banks[0]
    assert frozen.is_frozen and frozen.weight.grad is None and frozen.frozen is not None
    before = replica.read_record(0, 1)
    numel = 3 * DIM * 16
    assert replica.record_bytes(0) == before.numel() == 4 * numel  # of a trained one: 12
    assert replica.record_bytes(1) == 3 * 4 * 3 * DIM * 24
    assert [n for n, _ in replica.expert_tensors(0, 1)] == [
        f"model.base.experts.1.{field}" for field in ("w_gate", "w_up", "w_down")
    ]
    groups = [p for group in replica.optimizer.param_groups for p in group["params"]]
    assert not {id(p) for p in frozen.parameters()} & {id(p) for p in groups}
    sums = replica.record_checksum(0, 1)
    train(replica, steps=3)
    assert torch.equal(replica.read_record(0, 1), before)
    assert replica.record_checksum(0, 1) == sums
    squares = replica.expert_square_sums(np.zeros((2, EXPERTS), dtype=np.int32), 0)
    assert not squares[0].any() and squares[1].all()
    assert set(replica.scalars().split('"')) & {"moe.experts", "base.experts"} == {"moe.experts"}


def test_freezing_experts_after_the_build_is_refused_by_name() -> None:
    replica = replica_of(TwoLayers)
    replica.require_unchanged()
    replica.banks[1].weight.requires_grad_(False)
    with pytest.raises(UserMistakeError, match=r"^moe.experts.weight changed requires_grad"):
        replica.require_unchanged()


def test_only_trained_parameters_are_summed_over_the_ranks() -> None:
    """What a step sends for gradients: one dense sum, and one exchange for the trained layer."""
    replica = replica_of(TwoLayers)
    step = Step.__new__(Step)
    context = SimpleNamespace(table=None, exchange=None, served_ER=None, written=None)
    step._replica, step._summed = replica, set()
    step._world = SimpleNamespace(contexts=[context, context])  # type: ignore[assignment]
    step._sum_replicas(0)  # no table is asked and no exchange is used
    assert step._summed == {0}
    with pytest.raises(AttributeError):
        step._sum_replicas(1)
    dense = sum(p.numel() for _, p in replica.dense if p.requires_grad)
    assert replica.flat_grad.numel() == dense


def test_records_of_frozen_experts_move_slots_grow_and_travel() -> None:
    replica, other = replica_of(TwoLayers), replica_of(TwoLayers, seed=9)
    train(replica)
    wanted = {(x, e): replica.read_record(x, e) for x in (0, 1) for e in range(EXPERTS)}
    replica.ensure_slots(EXPERTS + 3)
    for layer in (0, 1):
        arrange(replica.banks[layer], replica.optimizer, [3, -1, 0, 2, 1])
        for expert in range(EXPERTS):
            assert torch.equal(replica.read_record(layer, expert), wanted[layer, expert])
            other.write_record(layer, other.slot_of(layer, expert), wanted[layer, expert])
            assert torch.equal(other.read_record(layer, expert), wanted[layer, expert])
    replica.place(0, [1], {})
    replica.place(0, [0, 1], {(0, 0): wanted[0, 0]})
    assert torch.equal(replica.read_record(0, 0), wanted[0, 0])
    replica.place(0, [1], {})
    replica.place(0, [0, 1], {})  # every copy was lost: as it was built
    assert torch.equal(replica.read_record(0, 0), wanted[0, 0])


def test_frozen_experts_are_saved_read_and_exported(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    replica, second = replica_of(TwoLayers, seed=1), replica_of(TwoLayers, seed=2)
    train(replica, steps=2)
    stored(url, replica)
    reader = CheckpointReader(url, load_manifest(url, 7))
    read_base(CheckpointRef(url, 7), second)
    for layer in (0, 1):
        for expert in range(EXPERTS):
            record = second.record_of(layer, expert, reader.expert(layer, expert))
            assert torch.equal(record, replica.read_record(layer, expert))
    export(url, str(tmp_path / "model.safetensors"))
    plain = TwoLayers()
    plain.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
    wanted = torch.stack([replica.banks[0].values(e)["w_up"] for e in range(EXPERTS)])
    found = [plain.base.experts.values(e)["w_up"] for e in range(EXPERTS)]
    assert torch.equal(torch.stack(found), wanted)


def test_a_partial_checkpoint_holds_nothing_that_is_frozen(tmp_path: Path) -> None:
    """The frozen parts of a full one stand for them, and stay when old checkpoints go."""

    def build() -> nn.Module:
        model = TwoLayers()
        model.embed.requires_grad_(False)
        return model

    url, replica = str(tmp_path), replica_of(build)
    stored(url, replica, step=1)
    first = load_manifest(url, 1)
    train(replica)
    share = share_report(replica, (), rank=0, scalars='{"optimizer": ""}')
    layers = [LayerEntry.from_json(entry) for entry in share["layers"]]
    assert [layer.parts() for layer in layers] == [("frozen",), ("weights", "optimizer")]
    (order,) = plan_save(
        Selection(snapshot=((0, 1), (0, 1)), persist=((0,), (0,))),
        ranks_of=lambda layer, expert: (0,),
        node_of_rank=[0],
        num_experts=EXPERTS,
        part_bytes={"weights": 1, "optimizer": 1},
        dense_bytes={n: 1 for n, _ in replica.dense_tensors() if n not in replica.frozen_names},
        layer_parts=[records.parts for records in replica.records],
    )
    assert [(o.layer, o.expert, o.parts) for o in order.experts] == [
        (1, 0, ("weights", "optimizer")), (1, 1, ("weights", "optimizer")),
    ]  # fmt: skip
    dense = {n: t for n, t in replica.dense_tensors() if n in order.dense_names}
    assert "model.embed.weight" not in dense and "model.moe.router.weight" in dense
    records = [
        record_of(RecordKey(layer=-1, expert=0, step=2, generation=1), dense, tag=TAG),
        record_of(
            RecordKey(layer=1, expert=0, step=2, generation=1),
            dict(replica.expert_tensors(1, 0)), tag=TAG,
        ),
    ]  # fmt: skip
    files = write_files(url, records, tag=TAG)
    second = commit_manifest(
        url, files, tag=TAG, step=2, layers=layers, dense_names=share["dense_names"],
        frozen_names=share["frozen_names"], lineage=[(1, 0)],
        meta={"scalars": "{}", "history": share["history"], "routed": share["routed"]},
        previous=first,
    )  # fmt: skip
    assert second.kind == "partial"
    assert second.dense["model.embed.weight"] == first.dense["model.embed.weight"]
    assert second.experts[0] == first.experts[0]
    oldest = [second.oldest(layer, expert).step for layer, expert in ((0, 1), (1, 0), (1, 1))]
    assert oldest == [2, 2, 1]  # frozen ones are as new as the checkpoint
    lost = lost_until(replace(second, meta={**second.meta, "routed": [[9] * EXPERTS] * 2}))
    assert {layer for layer, _ in lost.lost_by_expert()} == {1}  # and nothing of them is lost
    retain(url, keep=1)
    assert [m.step for m in find_checkpoints(url).manifests] == [2]
    reader = CheckpointReader(url, load_manifest(url, 2))
    record = replica.record_of(0, 1, reader.expert(0, 1))
    assert torch.equal(record, replica.read_record(0, 1))
    assert torch.equal(reader.dense()["model.embed.weight"], replica.model.embed.weight)


class Adapter(nn.Module):
    """Experts with a frozen bf16 matrix and a trained one, as a LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, DIM)
        bank = ExpertBank.of(
            TensorLayout({"b": (DIM, DIM)}, dim=DIM),
            num_experts=EXPERTS,
            frozen_layout=TensorLayout({"w": (DIM, DIM), "scale": (3,)}, dim=DIM),
            frozen_dtype=torch.bfloat16,
            source=lambda e: {
                "b": torch.full((DIM, DIM), 0.01),
                "w": torch.full((DIM, DIM), 1.0 + e),
                "scale": torch.full((3,), 0.5),
            },
        )
        self.moe = RoutedExperts(
            bank, top_k=2, run=lambda x, t: x @ t["w"].float() + x @ t["b"] * t["scale"][0].float()
        )
        self.router = nn.Linear(DIM, EXPERTS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        gate, expert = self.router(x).softmax(-1).topk(2)
        return self.moe(x, expert, gate)


def test_of_an_expert_with_an_adapter_the_rest_is_frozen_at_two_bytes(tmp_path: Path) -> None:
    url, replica = str(tmp_path), replica_of(Adapter, seed=1)
    train(replica, steps=2)
    records, bank = replica.records[0], replica.banks[0]
    assert records.parts == ("weights", "optimizer", "frozen")
    assert records.part_bytes() == {
        "weights": 4 * DIM * DIM, "optimizer": 8 * DIM * DIM, "frozen": 2 * (DIM * DIM + 16),
    }  # fmt: skip
    assert bank.weight.grad is not None and bank.weight.grad.shape == (EXPERTS, DIM * DIM)
    assert not torch.equal(bank.values(0)["b"], torch.full((DIM, DIM), 0.01))
    assert bool((bank.values(2)["w"] == 3.0).all()) and bank.values(2)["w"].dtype == torch.bfloat16
    stored(url, replica)
    reader, wanted = CheckpointReader(url, load_manifest(url, 7)), replica.read_record(0, 2)
    assert torch.equal(replica.record_of(0, 2, reader.expert(0, 2)), wanted)
    trained = {
        name: tensor for part, name, tensor in replica.expert_parts(0, 2) if part != "frozen"
    }  # what a keeper holds
    assert torch.equal(replica.record_of(0, 2, trained), wanted)
    replica.frozen_source = lambda layer, expert: {
        "w": torch.full((DIM, DIM), 9.0), "scale": torch.zeros(3),
    }  # fmt: skip
    replica.write_record(0, replica.slot_of(0, 2), replica.record_of(0, 2, trained))
    assert bool((bank.values(2)["w"] == 9.0).all())  # of the checkpoint that it was resumed from


def test_without_a_frozen_part_a_trained_tensor_is_never_taken_from_an_older_file(
    tmp_path: Path,
) -> None:
    url, replica = str(tmp_path), replica_of(TwoLayers)
    stored(url, replica, step=1)
    share = share_report(replica, (), rank=0, scalars="{}")
    with pytest.raises(CheckpointError, match=r"tensor model.embed.weight"):
        commit_manifest(
            url, [], tag=TAG, step=2,
            layers=[LayerEntry.from_json(entry) for entry in share["layers"]],
            dense_names=share["dense_names"], frozen_names=share["frozen_names"],
            lineage=[(1, 0)], meta={}, previous=load_manifest(url, 1),
        )  # fmt: skip

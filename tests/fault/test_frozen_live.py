"""Frozen experts and dense parameters in real runs: losses of nodes, checkpoints, a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from user_scripts import run_script

from lazarus.checkpoint.files.reader import open_state_dict
from lazarus.checkpoint.files.store import find_checkpoints

MODEL = """
def values(expert):
    generator = torch.Generator().manual_seed(expert)
    shapes = {"w_gate": (8, 16), "w_up": (8, 16), "w_down": (16, 8)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = MoELayer(dim=8, hidden=16, num_experts=4, top_k=2)
        self.base.experts.source = values
        self.base.experts.weight.requires_grad_(False)
        self.given = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
        nn.init.constant_(self.given.weight, 0.125)
        self.moe = MoELayer(dim=8, hidden=16, num_experts=4, top_k=2)
        self.head = nn.Linear(8, 1)
    def forward(self, x):
        x = x + self.base(x) + self.given(x.bfloat16()).float()
        return self.head(x + self.moe(x))
"""
SETTINGS = (
    "checkpoint.every=1", "checkpoint.k_persist=1", "checkpoint.k_snapshot=1",
    "checkpoint.keep=100", "recovery.compare_every=1", "placement.slots_per_node=3",
)  # fmt: skip


def values(expert: int) -> dict[str, torch.Tensor]:
    scope: dict[str, object] = {"torch": torch}
    source = MODEL.partition("class Model")[0]
    exec(source, scope)
    return scope["values"](expert)  # type: ignore[operator,no-any-return]


def assert_as_built(place: Path) -> None:
    state = open_state_dict(str(place / "checkpoints"))
    for expert in range(4):
        for field, wanted in values(expert).items():
            assert torch.equal(state[f"base.experts.{expert}.{field}"], wanted)
    assert state["given.weight"].dtype == torch.bfloat16
    assert bool((state["given.weight"] == 0.125).all())


def names_of(place: Path, step: int) -> set[str]:
    """Names of all tensors in the files that were written for one checkpoint."""
    found: set[str] = set()
    for path in (place / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.slow
def test_frozen_weights_are_as_built_after_losses_and_a_resume(tmp_path: Path) -> None:
    """A kill leaves a frozen expert without a copy; a resume elsewhere loses two nodes more."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    one = run_script(
        first, MODEL + 'options = {"faults": ["kill:1@3", "kill:2@3"]}\n', steps=6,
        settings=(*SETTINGS, "checkpoint.full_at_end=false"),
    )  # fmt: skip
    assert one.code == 0, one.err[-3000:]
    assert one.steps == [1, 2, 3, 4, 5, 6] and not one.of("replica_mismatch")
    assert_as_built(one.folder)
    manifests = find_checkpoints(str(one.folder / "checkpoints")).manifests
    kinds = [manifest.kind for manifest in manifests]
    assert kinds[0] == "full" and "partial" in kinds
    for manifest in manifests:
        named = names_of(one.folder, manifest.step)
        held = {name for name in named if ".base.experts." in name or ".given." in name}
        assert bool(held) == (manifest.kind == "full"), manifest.step
        assert not [name for name in held if name.startswith("optimizer")]
        assert any(name.startswith("optimizer") and ".moe.experts." in name for name in named)
    resumed = f"""
class Resumed(ElasticTrainer):
    def fit(self):
        return super().fit(resume={str(one.folder)!r})

ElasticTrainer = Resumed
options = {{"faults": ["kill:0@8", "kill:1@8"]}}
"""
    # Another source, as a later version of the program has: the checkpoint's weights are the run's.
    other = MODEL.replace("manual_seed(expert)", "manual_seed(expert + 100)")
    two = run_script(
        second, other.replace("0.125", "0.5") + resumed, steps=10,
        settings=(*SETTINGS, "checkpoint.full_at_end=true"),
    )  # fmt: skip
    assert two.code == 0, two.err[-3000:]
    assert two.steps == list(range(two.steps[0], 11)) and not two.of("replica_mismatch")
    assert two.steps[0] > kinds.index("partial") + 1  # it begins at a partial checkpoint
    assert {e["layer"] for e in two.of("expert_restored")} >= {0}
    assert_as_built(two.folder)


ADAPTERS = """
import copy
from dispatcher import TensorLayout
from lazarus.model.experts import ExpertBank
from lazarus.model.routed import RoutedExperts

def values(expert):
    return {"b": torch.zeros(8, 8), "w": torch.full((8, 8), 0.25 * expert)}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        bank = ExpertBank.of(
            TensorLayout({"b": (8, 8)}, dim=8), num_experts=4, source=values,
            frozen_layout=TensorLayout({"w": (8, 8)}, dim=8), frozen_dtype=torch.bfloat16,
        )
        self.moe = RoutedExperts(bank, top_k=2, run=lambda x, t: x @ (t["w"].float() + t["b"]))
        self.router = nn.Linear(8, 4)
        self.head = nn.Linear(8, 1)
    def forward(self, x):
        rows = x.reshape(-1, 8)
        gate, expert = self.router(rows).softmax(-1).topk(2)
        return self.head(x + self.moe(rows, expert, gate).view(x.shape))

class Average:
    def on_commit(self, ctx, step):
        twin = copy.deepcopy(self.model)
        assert twin.moe.experts.expert_of_slot == self.model.moe.experts.expert_of_slot
    def on_setup(self, ctx, model):
        self.model = model

options = {"faults": ["kill:2@6"], "hooks": [Average()]}
"""


@pytest.mark.slow
def test_adapters_come_back_from_memory_and_what_they_adapt_from_its_source(tmp_path: Path) -> None:
    left = run_script(
        tmp_path, ADAPTERS, steps=8, nodes=3,
        settings=(
            "checkpoint.every=4", "checkpoint.k_persist=4", "checkpoint.k_snapshot=4",
            "recovery.compare_every=1", "placement.slots_per_node=2",
            "placement.min_replicas=1", "checkpoint.full_at_end=true",
        ),
    )  # fmt: skip
    assert left.code == 0, left.err[-3000:]
    assert left.steps == list(range(1, 9)) and not left.of("replica_mismatch", "user_error")
    state = open_state_dict(str(left.folder / "checkpoints"))
    for expert in range(4):
        frozen = state[f"moe.experts.{expert}.w"]
        assert frozen.dtype == torch.bfloat16 and bool((frozen == 0.25 * expert).all())
    assert any(bool(state[f"moe.experts.{expert}.b"].any()) for expert in range(4))
    sources = {event["source"] for event in left.of("expert_restored")}
    assert sources and sources <= {"own_snapshot", "node_snapshot"}

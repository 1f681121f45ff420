"""train.elastic_determinism: after any loss, join or leave, the digests of one undisturbed process.

Every step's digest and loss of a disturbed run is compared with those of a run with a single rank.
The model has dropout, so the random numbers are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, at_step, watch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lazarus import MoELayer

STEPS = 8
SETTINGS = (
    "train.elastic_determinism=true",
    "run.digest_every=1",
    "eval.every=3",
    "eval.batches=2",
    "metrics.report=false",
    "placement.slots_per_node=6",  # one node must hold every expert
)
PHASES = ("data", "forward", "dispatch", "combine", "backward", "grad_sync", "commit", "optimizer")


class Net(nn.Module):
    """Dropout around experts; one layer has a shared expert, the other is balanced by bias."""

    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.drop = nn.Dropout(0.1)
        self.first = MoELayer(
            dim=32, hidden=48, num_experts=6, top_k=2, num_shared=1, recompute=recompute
        )
        self.mid = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.second = MoELayer(
            dim=32, hidden=32, num_experts=6, top_k=3, activation="gelu", bias=True, balance="bias",
            bias_rate=0.01,
        )  # fmt: skip
        self.norm = nn.LayerNorm(32)
        self.recompute = recompute

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.drop(self.embedding(tokens_BS))
        x = x + self.first(self.norm(x))
        if self.recompute and self.training:
            x = x + checkpoint(self.mid, x, use_reentrant=False)
        else:
            x = x + self.mid(x)
        x = x + self.drop(self.second(self.norm(x)))
        out: Tensor = self.norm(x) @ self.embedding.weight.t()
        return out


def _model(ctx: Any) -> nn.Module:
    return Net(recompute=False)


def _recomputing(ctx: Any) -> nn.Module:
    return Net(recompute=True)


def traces(watched: Watched) -> dict[str, dict[int, Any]]:
    """Digest, loss and held-out loss by step."""
    return {
        "digest": {e["step"]: e["digest"] for e in watched.of("state_digest")},
        "loss": {e["step"]: e["loss"] for e in watched.of("step_committed")},
        "eval": {e["step"]: e["loss"] for e in watched.of("evaluated")},
    }


def assert_same(
    watched: Watched, wanted: dict[str, dict[int, Any]], *, may_lack: Collection[int] = ()
) -> None:
    """All losses and digests are the wanted ones.

    Digests of ``may_lack`` may be missing: a part of one may be lost with a node or a controller.
    """
    found = traces(watched)
    missing = wanted["digest"].keys() - found["digest"].keys()
    assert missing <= set(may_lack)
    kept = {step: d for step, d in wanted["digest"].items() if step not in missing}
    assert found == wanted | {"digest": kept}


Go = Callable[..., Watched]


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    def run(*faults: str, nodes: int, settings: Sequence[str] = (), **options: Any) -> Watched:
        options.setdefault("model", _model)
        options.setdefault("steps", STEPS)
        folder = tmp_path_factory.mktemp("run") / "run"
        return watch(folder, *faults, nodes=nodes, settings=(*SETTINGS, *settings), **options)

    return run


@pytest.fixture(scope="module")
def alone(go: Go) -> Callable[..., dict[str, dict[int, Any]]]:
    """Traces of one undisturbed process."""

    @cache
    def run(*settings: str, steps: int = STEPS) -> dict[str, dict[int, Any]]:
        found = traces(go(nodes=1, settings=settings, steps=steps))
        assert len(found["digest"]) == len(set(found["digest"].values())) == steps
        assert found["eval"]
        return found

    return run


def test_a_run_that_loses_a_node_has_the_digests_of_one_process(go: Go, alone: Any) -> None:
    lost = go("kill:1@4/backward", nodes=3)
    assert [e["node"] for e in lost.of("node_lost")] == [1]
    assert traces(lost) == alone()


@pytest.mark.slow
def test_without_the_mode_another_number_of_nodes_has_other_digests(go: Go) -> None:
    off = ("train.elastic_determinism=false",)
    one, three = (traces(go(nodes=nodes, settings=off)) for nodes in (1, 3))
    assert one["digest"] != three["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(2,), (0,), (1, 3)], ids=["middle", "first", "two"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase(go: Go, alone: Any, phase: str, victims: tuple[int, ...]) -> None:
    lost = go(*(f"kill:{node}@4/{phase}" for node in victims), nodes=4)
    fired = {(e["node"], e["phase"]) for e in lost.of("fault_injected")}
    assert fired == {(node, phase) for node in victims}
    assert {e["node"] for e in lost.of("node_lost")} == set(victims)
    assert_same(lost, alone(), may_lack=(4,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("dispatch.transport=group",),
        ("dispatch.overlap=on",),
        ("recovery.heal=behind",),
        ("placement.min_replicas=1",),
        ("placement.min_replicas=3",),
    ],
    ids=lambda settings: settings[0],
)
def test_settings_that_change_no_bit(go: Go, alone: Any, settings: tuple[str, ...]) -> None:
    assert traces(go("leave:2@4", nodes=4, settings=settings)) == alone()


@pytest.mark.slow
def test_two_ranks_a_node_and_recomputation(go: Go, alone: Any) -> None:
    two = go("kill:1@4/combine", nodes=2, settings=("cluster.ranks_per_node=2",))
    assert_same(two, alone(), may_lack=(4,))
    assert traces(go(nodes=3, model=_recomputing)) == alone()


@pytest.mark.slow
def test_a_node_that_joins_while_the_controller_is_killed(go: Go, alone: Any) -> None:
    joined = go(
        "controller@3",
        nodes=2,
        steps=40,
        settings=("cluster.max_nodes=3",),
        acts=[at_step(5, Watched.start_node)],
    )
    assert joined.of("node_joined")
    assert max(e["num_nodes"] for e in joined.of("step_committed")) == 3
    assert_same(joined, alone(steps=40), may_lack=range(1, 8))


@pytest.mark.slow
def test_chains_are_another_sum_and_the_same_on_all_ranks(go: Go, alone: Any) -> None:
    chains = "train.gradient_chains=4"
    wanted = alone(chains)
    assert wanted["digest"] != alone()["digest"]
    for nodes in (2, 3, 4):
        lost = go(f"kill:{nodes - 1}@4/forward", nodes=nodes, settings=(chains,))
        assert_same(lost, wanted, may_lack=(4,))


@pytest.mark.slow
def test_resumed_on_another_number_of_nodes(go: Go, alone: Any, tmp_path: Path) -> None:
    full = ("checkpoint.full_at_end=true",)
    first = go(nodes=3, settings=full, acts=[at_step(3, Watched.stop)])
    assert first.status == "stopped"
    second = go(nodes=2, settings=full, resume=first.folder)
    both = {**traces(first)["digest"], **traces(second)["digest"]}
    assert both == alone()["digest"]

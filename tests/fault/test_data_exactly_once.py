"""Every sample once, whatever dies: streams, ledger, evaluations, comparisons in real runs."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lazarus import LossSum
from lazarus.config.train_config import TrainConfig
from lazarus.data.sampler import step_sample_ids
from lazarus.data.stream import step_sample_numbers
from lazarus.model import gpt
from lazarus.model.moe import moe_layers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

BATCH, SEQ, SHARDS = 11, 16, 7
PHASES = ("data", "forward", "dispatch", "combine", "backward", "grad_sync", "commit", "optimizer")


class Shards:
    """Item k of shard i is sample ``k * SHARDS + i``, and its tokens follow from that number."""

    def shard(self, i: int, of: int, /) -> Shard:
        assert of == SHARDS
        return Shard(i)


class Shard:
    def __init__(self, number: int) -> None:
        self.number, self.place = number, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        sample = self.place * SHARDS + self.number
        self.place += 1
        return sample_of(sample)

    def state_dict(self) -> Mapping[str, Any]:
        return {"place": torch.tensor(self.place)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.place = int(state["place"])


class Indexed:
    """The same samples by index."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return sample_of(index)


def sample_of(number: int) -> dict[str, Tensor]:
    tokens = np.random.default_rng(number).integers(0, 256, SEQ + 1)
    return {"tokens": torch.from_numpy(tokens), "number": torch.tensor(number)}


def model(ctx: Any) -> nn.Module:
    config = TrainConfig.load(
        overrides=["model.layers=2", "model.dim=32", "model.heads=2", "model.seq_len=16",
                   "model.experts=6", "model.moe_every=1", "model.ffn_mult=2"]
    )  # fmt: skip
    built = gpt.build(config.model)
    built.ctx = ctx
    return built


def loss(module: Any, batch: Mapping[str, Tensor]) -> LossSum:
    """Says which samples it really saw: their sum and the sum of squares, as means over samples."""
    numbers = batch["number"].double()
    for power in (1, 2):
        module.ctx.log(f"power {power}", float((numbers**power).mean()), weight=len(numbers))
    return gpt.loss(module, batch)


def schedule(seed: int, *, steps: int) -> list[str]:
    """Two losses or leaves and two joins at random points of five nodes, and node 0 at last.

    Joins take their time, so only first nodes are struck; node 0, which calls joiners, comes last.
    """
    rng = random.Random(f"faults {seed}")
    first, second = rng.sample([1, 2, 3, 4], 2)
    fifth = steps // 5
    return [
        f"kill:{first}@{fifth}/{rng.choice(PHASES)}",
        f"join@{2 * fifth - rng.randint(0, 2)}",
        rng.choice(
            [f"kill:{second}@{3 * fifth}/{rng.choice(PHASES)}", f"leave:{second}@{3 * fifth}"]
        ),
        f"join@{4 * fifth - rng.randint(0, 2)}",
        f"kill:0@{steps - 1}/{rng.choice(PHASES)}",
    ]


def assert_read_exactly(outcome: Any, step: int, ids: np.ndarray) -> None:
    """The ledger and what the losses of the committed attempt really saw."""
    (ledger,) = [e for e in outcome.of("ledger") if e["step"] == step]
    assert ledger["sample_ids"] == ids.tolist()
    (commit,) = [e for e in outcome.of("step_committed") if e["step"] == step]
    for power in (1, 2):
        name = f"power {power}"
        assert commit["metric_weights"][name] == BATCH
        wanted = float((ids.astype(np.float64) ** power).sum())
        assert commit["metrics"][name] * BATCH == pytest.approx(wanted, rel=1e-12)


def assert_all_struck(outcome: Any, faults: list[str]) -> None:
    assert sorted(e["spec"] for e in outcome.of("fault_injected")) == sorted(faults)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_is_read_exactly_once_across_losses_leaves_and_joins(run: Any, seed: int) -> None:
    steps = 38  # past two exchanges of positions
    faults = schedule(seed, steps=steps)
    outcome = run(
        *faults,
        steps=steps,
        settings=(f"data.num_shards={SHARDS}", "run.ledger=true", "cluster.join_debounce_s=0.1"),
        model=model,
        loss=loss,
        data=lambda ctx: Shards(),
    )
    assert_all_struck(outcome, faults)
    assert len(outcome.of("node_lost")) + len(outcome.of("node_left")) == 3
    outcome.assert_exactly_once(steps)
    for step in range(1, steps + 1):
        assert_read_exactly(outcome, step, step_sample_numbers(step, BATCH))
    assert not outcome.of("ledger_mismatch")


@pytest.mark.parametrize("seed", [3, 4])
def test_indexed_samples_are_used_exactly_once_across_random_losses(run: Any, seed: int) -> None:
    steps = 24
    faults = schedule(seed, steps=steps)
    outcome = run(
        *faults,
        steps=steps,
        settings=("run.ledger=true", "cluster.join_debounce_s=0.1"),
        model=model,
        loss=loss,
        data=lambda ctx: Indexed(),
    )
    assert_all_struck(outcome, faults)
    outcome.assert_exactly_once(steps)
    used: list[int] = []
    for step in range(1, steps + 1):
        ids = step_sample_ids(0, step, BATCH, 100)
        assert_read_exactly(outcome, step, ids)
        used += ids.tolist()
    for epoch in range(len(used) // 100):
        assert sorted(used[100 * epoch : 100 * (epoch + 1)]) == list(range(100))


def test_a_resumed_stream_goes_on_where_the_checkpoint_stands(run: Any) -> None:
    options: dict[str, Any] = {"model": model, "loss": loss, "data": lambda ctx: Shards()}
    settings = (
        f"data.num_shards={SHARDS}",
        "run.ledger=true",
        "checkpoint.full_at_end=true",
        "optim.schedule=constant",
    )
    first = run("kill:1@5/backward", nodes=3, steps=20, settings=settings, **options)
    again = run(nodes=2, steps=24, settings=settings, resume=first.folder, **options)
    steps = [e["step"] for e in again.of("step_committed")]
    assert steps == list(range(1, 25))
    for step in steps:
        assert_read_exactly(again, step, step_sample_numbers(step, BATCH))


class DiesOnce:
    """Held-out data whose reader on one node is killed, once, in the middle of an evaluation."""

    def __init__(self, marker: Path, *, node: int) -> None:
        self.marker, self.node = marker, node

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.node == 1:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return sample_of(500 + index)
            os.kill(os.getpid(), signal.SIGKILL)
        return sample_of(500 + index)


def test_a_loss_during_an_evaluation_restarts_it_and_never_the_step(
    run: Any, tmp_path: Path
) -> None:
    settings = ("eval.every=3", "eval.batches=2", "run.ledger=true")
    marker = tmp_path / "killed"
    options: dict[str, Any] = {"model": model, "loss": loss, "data": lambda ctx: Indexed()}
    struck = run(
        nodes=4, steps=6, settings=settings, **options,
        eval_data=lambda ctx: DiesOnce(marker, node=ctx.node),
    )  # fmt: skip
    calm = run(
        nodes=4, steps=6, settings=settings, **options,
        eval_data=lambda ctx: DiesOnce(marker, node=0),
    )  # fmt: skip
    assert marker.exists()
    assert [e["node"] for e in struck.of("node_lost")] == [1]
    (lost,) = struck.of("reconfigured")
    assert lost["step"] == 3  # nothing of step 3 was done again
    struck.assert_exactly_once(6)
    for outcome in (struck, calm):
        assert [(e["step"], e["count"]) for e in outcome.of("evaluated")] == [
            (3, 22 * SEQ),
            (6, 22 * SEQ),
        ]
    for one, other in zip(struck.of("evaluated"), calm.of("evaluated"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert struck.of("evaluated")[0]["generation"] == lost["generation"]


class FlipsABit:
    """A machine that computes wrongly once: node 1 after step 4."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_setup(self, ctx: Any, model: nn.Module) -> None:
        self.model = model

    def on_commit(self, ctx: Any, step: int) -> None:
        if (ctx.node, step) != (1, 4):
            return
        bank = moe_layers(self.model)["blocks.1.ffn"].experts
        slot = next(s for s, e in enumerate(bank.expert_of_slot) if e >= 0)
        dense = next(self.model.parameters())
        target = dense if self.what == "dense" else bank.weight.detach()[slot]
        target.detach().view(-1).view(torch.int32)[5] ^= 1 << 3


@pytest.mark.parametrize("what", ["dense", "expert"])
def test_a_flipped_bit_is_reported_with_its_place(run: Any, what: str) -> None:
    outcome = run(
        nodes=4,
        steps=6,
        settings=("recovery.compare_every=2",),
        model=model,
        loss=loss,
        data=lambda ctx: Indexed(),
        hooks=[FlipsABit(what)],
    )
    outcome.assert_exactly_once(6)
    seen = outcome.of("replica_mismatch")
    assert [e["step"] for e in seen if e["layer"] == (-1 if what == "dense" else 1)][:1] == [4]
    assert not [e for e in seen if e["step"] < 4]
    first = seen[0]
    if what == "dense":
        assert (first["layer"], first["expert"]) == (-1, -1)
        assert (first["nodes"], first["majority"]) == ([1], True)
    else:
        assert first["layer"] == 1 and 0 <= first["expert"] < 6
        assert 1 in first["nodes"]


def test_a_healthy_run_compares_equal_across_a_loss(run: Any) -> None:
    outcome = run("kill:2@4/backward", nodes=4, steps=8, settings=("recovery.compare_every=1",))
    outcome.assert_exactly_once(8)
    assert not outcome.of("replica_mismatch")


def test_ledger_and_evaluations_survive_the_controller(run: Any) -> None:
    settings = ("run.ledger=true", "eval.every=4", "eval.batches=1")
    options: dict[str, Any] = {"model": model, "loss": loss, "data": lambda ctx: Indexed()}
    outcome = run(
        "controller@9", "kill:1@15/combine", nodes=4, steps=20, settings=settings, **options,
        eval_data=lambda ctx: Indexed(),
    )  # fmt: skip
    assert {e["kind"] for e in outcome.of("fault_injected")} == {"controller", "kill"}
    outcome.assert_exactly_once(20)
    for step in range(1, 21):
        assert_read_exactly(outcome, step, step_sample_ids(0, step, BATCH, 100))
    assert [e["step"] for e in outcome.of("evaluated")] == [4, 8, 12, 16, 20]


class Shorter(Indexed):
    def __len__(self) -> int:
        return 99


def test_a_joiner_with_other_data_is_turned_away_and_the_run_goes_on(run: Any) -> None:
    outcome = run(
        "join@3",
        nodes=3,
        steps=60,
        settings=("run.ledger=true", "cluster.join_debounce_s=0.05"),
        model=model,
        loss=loss,
        data=lambda ctx: Indexed() if ctx.node < 3 else Shorter(),
    )
    outcome.assert_exactly_once(60)
    errors = {e["node"]: e["error"] for e in outcome.of("user_error")}
    assert set(errors) == {3}
    assert "99 samples here and 100 in the run" in errors[3]
    assert not outcome.of("node_joined")
    for step in range(1, 61):
        assert_read_exactly(outcome, step, step_sample_ids(0, step, BATCH, 100))

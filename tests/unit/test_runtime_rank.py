"""Whose state a rank of a resumed run has: the checkpoint's, until it takes over another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace as changed
from one_rank import one_run, orders_of, spec_of

from lazarus import ElasticTrainer, TrainConfig
from lazarus.control.messages import Align, Prepare
from lazarus.run.run_place import open_place
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.worker.process import Worker
from lazarus.runtime.worker.rank import Rank

SMALL = (
    "cluster.launcher=process", "cluster.nodes=1", "model.layers=2", "model.dim=16",
    "model.heads=2", "model.seq_len=8", "model.experts=4", "model.moe_every=1",
    "model.ffn_mult=1", "train.global_batch=3", "train.micro_batch_size=2", "train.steps=3",
    "optim.warmup_steps=2", "checkpoint.every=0", "placement.min_replicas=1",
    "placement.slots_per_node=4",
)  # fmt: skip


@dataclass
class Resumed:
    """A rank of a run that was resumed after step 3, and what the run before it has left."""

    worker: Worker
    rank: Rank
    order: Prepare  # of the first generation of the run before
    end: str  # checksum of the dense state that run ended with

    def fence(self, generation: int) -> None:
        self.worker._ledger.raise_fence(generation, self.rank.release)


@pytest.fixture
def resumed(tmp_path: Path) -> Iterator[Resumed]:
    store = RendezvousStore("127.0.0.1", timeout_s=60).open()
    first = TrainConfig.load(overrides=[*SMALL, f"run.dir={tmp_path}/first"])
    before = one_run(first, tmp_path / "scratch1", store)
    order = next(body for body in before.told if isinstance(body, Prepare))
    second = TrainConfig.load(overrides=[*SMALL, "train.steps=6", f"run.dir={tmp_path}/second"])
    place = open_place(second, resume=tmp_path / "first", allow_change=("train.steps",))
    try:
        spec = spec_of(ElasticTrainer(place.config), place, tmp_path / "scratch2")
        worker = Worker(orders_of(spec).workers[0])
        rank = worker._build()
        end = before.rank.parts.replica.dense_digest()
        yield Resumed(worker, rank, changed(order, store=store.address), end)
        rank.release()
        rank.close()
    finally:
        place.leave()


def test_a_rank_of_a_resumed_run_aligns_with_the_state_of_the_checkpoint(resumed: Resumed) -> None:
    resumed.fence(1)
    aligned = resumed.rank.aligned(Align(generation=1, step=3), 1)
    assert (aligned.step, aligned.dense_digest) == (3, resumed.end)


def test_a_node_that_joins_with_a_rollback_keeps_its_state_if_no_resume_reaches_it(
    resumed: Resumed,
) -> None:
    """The others have resumed from there, and the next generation aligns on it."""
    rank = resumed.rank
    resumed.fence(1)
    rank.prepare(changed(resumed.order, step=0, reload="init", probe=False), 1)
    resumed.fence(2)
    aligned = rank.aligned(Align(generation=2, step=0), 1)
    assert aligned.step == 0
    assert aligned.dense_digest != resumed.end

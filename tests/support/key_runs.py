"""What a run does under a configuration, for the tests of every key."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank, Orders, orders_of, spec_of

from lazarus import ElasticTrainer, LossSum, TrainConfig
from lazarus.model import gpt
from lazarus.run.run_place import open_place
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.keeper.process import KeeperProcess
from lazarus.runtime.launch.local_nodes import NodePlace
from lazarus.runtime.training import defaults
from lazarus.runtime.worker.user_errors import UserCodeFailure

SMALL = (
    "cluster.launcher=process", "cluster.nodes=1", "model.layers=2", "model.dim=16",
    "model.heads=2", "model.seq_len=8", "model.experts=4", "model.moe_every=1",
    "model.ffn_mult=1", "train.global_batch=3", "train.micro_batch_size=2", "train.steps=3",
    "optim.warmup_steps=2", "checkpoint.every=0", "checkpoint.full_at_end=false",
    "placement.min_replicas=1", "placement.slots_per_node=4",
)  # fmt: skip


@dataclass
class Place:
    """Where the observations of one configuration are made."""

    folder: Path
    store: RendezvousStore
    keeper: KeeperProcess
    monkeypatch: pytest.MonkeyPatch

    def config(self, *overrides: str) -> TrainConfig:
        own = f"run.dir={self.folder}/run"
        return TrainConfig.load(overrides=[*SMALL, own, *overrides])

    def orders(self, config: TrainConfig, *, keeper: str = "", **user: Any) -> Orders:
        place = open_place(config, resume=None)
        try:
            spec = spec_of(ElasticTrainer(place.config, **user), place, self.folder / "scratch")
            return orders_of(spec, place=NodePlace(host="127.0.0.1", keeper=keeper))
        finally:
            place.leave()

    def run(self, config: TrainConfig, *, keeper: str = "", **user: Any) -> OneRank:
        return OneRank(self.orders(config, keeper=keeper, **user), self.store).run()


def story(at: Place, config: TrainConfig) -> Any:
    """What the record says of a run, and the state that it ends with."""
    run = at.run(config)
    return [_plain(event) for event in run.events], run.rank.parts.replica.dense_digest()


def _plain(event: Mapping[str, Any]) -> dict[str, Any]:
    """Without figures that differ between two runs of one configuration."""
    odd = {"run", "run_id", "id", "config", "url", "checkpoint"}
    return {k: v for k, v in event.items() if k not in odd and not k.endswith("_s")}


def stream_story(at: Place, config: TrainConfig) -> Any:
    return at.run(config, data=Letters(), collate=_stacked, loss=gpt.loss).losses


class Letters:
    """A stream, cut into shards."""

    def shard(self, i: int, of: int) -> Any:
        return _Shard(i, of)


class _Shard:
    def __init__(self, i: int, of: int) -> None:
        self.at, self.i, self.of = 0, i, of

    def __iter__(self) -> _Shard:
        return self

    def __next__(self) -> Any:
        self.at += 1
        tokens = torch.arange(9) * (1 + self.i + self.at * self.of) % 256
        return {"tokens": tokens[:-1], "targets": tokens[1:]}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.at = state["at"]


def _stacked(items: list[Any]) -> Any:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


READERS: list[str] = []  # threads that read samples of ``Noted``


class Noted:
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        READERS.append(threading.current_thread().name)
        return {"tokens": torch.arange(8) + index, "targets": torch.arange(8) + index + 1}


def readers(at: Place, config: TrainConfig) -> Any:
    """The threads that read the data."""
    READERS.clear()
    at.run(config, data=Noted(), loss=gpt.loss)
    return {name == "MainThread" for name in READERS}


def forwards(at: Place, config: TrainConfig) -> Any:
    """How often linear layers computed."""
    count, forward = [0], torch.nn.Linear.forward

    def counting(self: torch.nn.Linear, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return forward(self, *args, **kwargs)

    with at.monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", counting)
        at.run(config)
    return count[0]


def dealing(at: Place, config: TrainConfig) -> Any:
    """The units of a step, how experts' rows are kept apart, and in how many sums."""
    rank = at.run(config).rank
    assert rank.generation is not None
    sync = rank.parts.replica.dense_sync
    return (
        rank.generation.rule,
        getattr(sync, "_num_chains", None),
        rank.parts.replica.dense_digest(),
    )


def nonfinite(at: Place, config: TrainConfig) -> Any:
    """How a run ends whose losses are no numbers."""
    try:
        run = at.run(config, loss=_no_number)
    except UserCodeFailure as failure:
        return str(failure.problem)
    return len(run.of("step_skipped"))


def _no_number(model: torch.nn.Module, batch: Any) -> LossSum:
    found = gpt.loss(model, batch)
    return LossSum(found.total * float("nan"), found.count)


def state_names(at: Place, config: TrainConfig) -> Any:
    """What a checkpoint would hold beside experts."""
    rank = at.run(config, model=_with_buffer).rank
    return [name for name, _ in rank.parts.replica.dense_tensors()]


def _with_buffer(ctx: Any) -> torch.nn.Module:
    model = defaults.model(TrainConfig.load(overrides=SMALL))
    model.register_buffer("seen", torch.zeros(3))
    return model

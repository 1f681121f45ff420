"""Every key of the configuration changes something: what a run does, is told, or plans.

A key without an entry fails. An entry names a change, what else must be set for it to matter, and
what is looked at with and without it. Runs are whole ones of one rank, in this process.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from certificates import make_pair
from key_orders import (
    begun_saves,
    callbacks,
    chaos,
    checkpoint_place,
    comparisons,
    control,
    credentials,
    driver_limits,
    ending,
    faults,
    folder,
    gauges,
    hosts,
    hugging_face,
    joins,
    keeper_story,
    kept,
    launcher,
    overlap,
    policies,
    progress,
    ray_needs,
    repairs,
    run_id,
    shape,
    split,
    time_limits,
    timeouts,
    transport,
    workers,
)
from key_runs import Place, dealing, forwards, nonfinite, readers, state_names, story, stream_story
from small_tokenizers import tokenizer_file

from lazarus import TrainConfig
from lazarus.config import layers
from lazarus.errors import ConfigError
from lazarus.run.control_config import KEYS
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.rpc.credentials import Credentials


@pytest.fixture(scope="module")
def services() -> Iterator[tuple[RendezvousStore, KeeperProcess]]:
    keeper = start_keeper(
        KeeperConfig(job="walk", credentials=Credentials(secret="s"), silent_s=30.0)
    )
    yield RendezvousStore("127.0.0.1", timeout_s=60).open(), keeper
    keeper.stop()


@pytest.fixture
def place(
    tmp_path: Path,
    services: tuple[RendezvousStore, KeeperProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Place(tmp_path, *services, monkeypatch)


@dataclass(frozen=True)
class Entry:
    change: str
    look: Callable[[Place, TrainConfig], Any]
    beside: tuple[str, ...] = ()


def at_sight(change: str) -> Entry:
    """The controller's own, through the one mapping."""
    field = next(f for f, key in KEYS.items() if key == change.partition("=")[0])
    return Entry(change, control(field))


NAMED = ("data.source=named_functions:either", "train.loss=named_functions:any_loss")
TOKENS = ("data.tokenizer=tokenizer.json", "data.path=rows.jsonl", "model.vocab=300")
RAY = ("cluster.launcher=ray",)
SAVES = ("checkpoint.every=1", "checkpoint.k_snapshot=2", "checkpoint.k_persist=1")
TLS = ("security.cert=pair/job.pem", "security.key=pair/job.key", "security.ca=pair/ca.pem")
ENTRIES = (
    Entry("preset=gpt-s", shape),
    Entry("run.dir=elsewhere", folder),
    Entry("run.name=other", run_id),
    Entry("run.seed=7", story),
    Entry("run.digest_every=2", story),
    Entry("run.ledger=true", story),
    Entry("cluster.nodes=2", driver_limits),
    Entry("cluster.min_nodes=2", control("min_nodes"), ("cluster.nodes=3",)),
    Entry("cluster.max_nodes=3", driver_limits),
    Entry("cluster.replace_lost=false", driver_limits),
    Entry("cluster.ranks_per_node=2", workers),
    Entry("cluster.cpus_per_rank=2.0", ray_needs, RAY),
    Entry("cluster.memory_per_rank=8GiB", ray_needs, RAY),
    Entry('cluster.node_labels={"disk"="fast"}', ray_needs, RAY),
    Entry("cluster.address=10.0.0.1:6379", joins),
    at_sight("cluster.join_debounce_s=9.0"),
    at_sight("cluster.quorum_timeout_s=9.0"),
    Entry("cluster.launcher=cold", launcher),
    Entry("model.preset=gpt-s", shape),
    Entry("model.hf=folder", hugging_face),
    Entry("model.builder=named_functions:model", story, NAMED),
    Entry("model.layers=3", story),
    Entry("model.dim=32", story),
    Entry("model.heads=1", story),
    Entry("model.vocab=300", story),
    Entry("model.seq_len=16", story),
    Entry("model.experts=3", story),
    Entry("model.top_k=1", story),
    Entry("model.ffn_mult=2", story),
    Entry("model.moe_every=2", story),
    Entry("data.path=text.txt", story),
    Entry("data.source=named_functions:letters", story),
    Entry("data.tokenizer=tokenizer.json", story, TOKENS[1:]),
    Entry("data.text_key=other", story, TOKENS),
    Entry("data.packing=false", story, TOKENS),
    Entry("data.seq_len=4", story),
    Entry("data.num_shards=8", stream_story),
    Entry("data.shuffle_shards=true", stream_story),
    Entry("data.prefetch_steps=0", readers),
    Entry("data.split=0.5", story),
    Entry("train.steps=4", story),
    Entry("train.global_batch=4", story),
    Entry("train.micro_batch_size=1", forwards),
    Entry("train.precision=bf16", story),
    Entry("train.recompute=true", forwards),
    Entry("train.elastic_determinism=true", dealing),
    Entry("train.gradient_chains=2", dealing, ("train.elastic_determinism=true",)),
    Entry("train.on_nonfinite=stop", nonfinite),
    Entry('train.scratch_buffers=["seen"]', state_names),
    Entry("train.loss=named_functions:doubled", story),
    Entry("optim.lr=0.1", story),
    Entry("optim.betas=[0.5, 0.5]", story),
    Entry("optim.eps=0.1", story),
    Entry("optim.weight_decay=10.0", story),
    Entry("optim.clip_norm=0.001", story, ("optim.eps=0.1",)),
    Entry("optim.schedule=constant", story),
    Entry("optim.warmup_steps=0", story),
    Entry("optim.min_lr_ratio=0.9", story),
    Entry("optim.builder=named_functions:descent", story),
    Entry("eval.every=2", story),
    Entry("eval.batches=1", story, ("eval.every=2",)),
    Entry("dispatch.mode=balanced", split),
    Entry("dispatch.rows_per_replica=9.0", split),
    Entry("dispatch.ranks_per_device=2.0", split),
    Entry("dispatch.overlap=on", overlap),
    Entry("dispatch.transport=group", transport),
    at_sight("placement.min_replicas=2"),
    Entry("placement.slots_per_node=5", control("slots_per_node")),
    at_sight("placement.spare_losses=1"),
    at_sight("placement.memory_fraction=0.5"),
    at_sight("placement.solver=ilp"),
    Entry("placement.policy=dry_policies:Skewed", policies),
    at_sight("placement.resilience_weight=0.5"),
    Entry("placement.domains=zone", control("plans_by_zone")),
    Entry("placement.max_plan_ms=5.0", time_limits, ("placement.policy=dry_policies:Skewed",)),
    Entry("recovery.tolerated_stall_s=3.0", timeouts),
    at_sight("recovery.on_lost_expert=fail"),
    at_sight("recovery.heal=behind"),
    Entry("recovery.compare_every=2", comparisons),
    Entry("recovery.on_mismatch=stop", repairs),
    Entry("recovery.policy=user_policies:stop", policies),
    Entry("checkpoint.url=elsewhere", checkpoint_place),
    Entry("checkpoint.every=2", keeper_story, SAVES[1:]),
    Entry("checkpoint.k_snapshot=3", keeper_story, SAVES),
    Entry("checkpoint.k_persist=2", keeper_story, SAVES),
    Entry("checkpoint.select=full", keeper_story, SAVES),
    Entry("checkpoint.parts=W", keeper_story, SAVES),
    at_sight("checkpoint.plt_budget=0.5"),
    Entry("checkpoint.keep=5", kept),
    Entry("checkpoint.full_at_end=true", story),
    Entry("checkpoint.copies=0", keeper_story, SAVES),
    Entry("metrics.prometheus=false", gauges, ("cluster.address=10.0.0.1:6379",)),
    Entry("metrics.tensorboard=true", callbacks),
    Entry("metrics.wandb_project=x", callbacks),
    Entry("metrics.progress=json", progress),
    Entry("metrics.on_callback_error=fail", ending),
    Entry("metrics.report=false", ending),
    Entry("security.bind=0.0.0.0", hosts),
    Entry("security.tls=true", credentials, (*TLS, *SAVES)),
    Entry("security.cert=other/job.pem", credentials, ("security.tls=true", *TLS, *SAVES)),
    Entry("security.key=other/job.key", credentials, ("security.tls=true", *TLS, *SAVES)),
    Entry("security.ca=other/ca.pem", credentials, ("security.tls=true", *TLS, *SAVES)),
    Entry("security.tls_name=x", credentials, ("security.tls=true", *TLS, *SAVES)),
    Entry("security.secret_file=secret", credentials, SAVES),
    Entry('faults.specs=["slow:0@2,factor=1.5"]', faults),
    Entry("faults.chaos=mtbf=30s,seed=1,kinds=kill+join", chaos),
)  # fmt: skip


def key_of(entry: Entry) -> str:
    return entry.change.partition("=")[0]


def test_every_key_has_an_entry() -> None:
    assert sorted(map(key_of, ENTRIES)) == sorted(layers.keys_of(TrainConfig))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pair(folder / "pair", "IP:127.0.0.1")
    make_pair(folder / "other", "IP:127.0.0.1")
    return folder


@pytest.mark.parametrize("entry", ENTRIES, ids=key_of)
def test_a_key_changes_what_a_run_does_is_told_or_plans(
    entry: Entry, place: Place, pairs: Path
) -> None:
    (place.folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 99)
    tokenizer_file(place.folder / "tokenizer.json")
    rows = [{"text": f"the lazy dog {i} " * 3, "other": f"a fox {i} " * 4} for i in range(30)]
    (place.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place.monkeypatch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    secret = place.folder / "secret"
    secret.write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    for name in ("pair", "other"):
        (place.folder / name).symlink_to(pairs / name)
    before = entry.look(place, place.config(*entry.beside))
    after = entry.look(place, place.config(*entry.beside, entry.change))
    assert before != after


def test_what_a_process_is_handed_arrives_whole(place: Place) -> None:
    """By the pickle of a fork server and of Ray: the configuration is one value, typed."""
    given = ["cluster.node_labels={'disk'='fast'}", 'data.path="none"', "optim.betas=[0.5, 0.5]"]
    orders = place.orders(place.config(*given))
    (spec,) = orders.workers
    assert isinstance(spec.config, TrainConfig)
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301
    assert cloudpickle.loads(cloudpickle.dumps(spec)) == spec
    arrived = pickle.loads(pickle.dumps(orders.controller))  # noqa: S301
    assert replace(arrived, config=orders.controller.config) == orders.controller
    assert dict(pickle.loads(pickle.dumps(spec.config)).origins) == dict(spec.config.origins)  # noqa: S301


def test_the_last_full_checkpoint_takes_the_place_of_a_partial_one(place: Place) -> None:
    def steps(*more: str) -> set[int]:
        begun = begun_saves(place, place.config(*SAVES, *more))
        return {item[0] for item in begun if isinstance(item[0], int)}

    assert steps() == {1, 2, 3}
    assert steps("checkpoint.full_at_end=true") == {1, 2}


def test_a_loss_that_is_no_number_ends_the_run_where_it_arises(place: Place) -> None:
    """Not only at the end of the step, from the sums of all ranks."""
    assert "the loss is nan" in nonfinite(place, place.config("train.on_nonfinite=stop"))


def test_a_fault_may_name_a_node_that_chaos_brings(place: Place) -> None:
    fifth = 'faults.specs=["kill:5@2"]'
    with pytest.raises(ConfigError, match="there is no node 5"):
        place.orders(place.config(fifth))
    place.orders(place.config(fifth, "faults.chaos=mtbf=30s,seed=1,kinds=join"))


def test_a_launcher_of_processes_is_told_among_how_many_nodes_it_divides_its_machine(
    place: Place,
) -> None:
    (given,) = launcher(place, place.config("cluster.nodes=2"))
    assert given["nodes"] == 2

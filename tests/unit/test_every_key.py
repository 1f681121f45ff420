"""Every key of the configuration changes something: what a run does, is told, or plans.

A key without an entry fails. An entry names a change, what else must be set for it to matter, and
what is looked at with and without it. Runs are whole ones of one rank, in this process.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from certificates import make_pair
from one_rank import OneRank, Orders, orders_of, spec_of
from small_tokenizers import tokenizer_file

from lazarus import ElasticTrainer, LossSum, TrainConfig
from lazarus.callbacks import configured
from lazarus.commands import train as train_command
from lazarus.config import layers
from lazarus.console.progress import Progress
from lazarus.errors import ConfigError
from lazarus.model import gpt
from lazarus.run import trainer
from lazarus.run.control_config import KEYS, policies_of
from lazarus.run.run_place import open_place
from lazarus.runtime.comm.groups import Group
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.driver import driver as driver_of_runs
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.launch import choose_launcher
from lazarus.runtime.launch.choose_launcher import joins_cluster, launcher_of, own_hosts
from lazarus.runtime.launch.local_nodes import NodePlace
from lazarus.runtime.rpc.credentials import Credentials
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


# ---- what is looked at --------------------------------------------------------------------------


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


def shape(at: Place, config: TrainConfig) -> Any:
    return config.model, config.optim.lr


def hugging_face(at: Place, config: TrainConfig) -> Any:
    """What builds the model, and its loss."""
    from lazarus import hf

    with at.monkeypatch.context() as patch:
        patch.setitem(vars(hf), "load", lambda folder, **given: ("loaded", folder))
        built = defaults.model(config)
    return built if isinstance(built, tuple) else type(built), defaults.loss_of(config)


def driver_limits(at: Place, config: TrainConfig) -> Any:
    return replace(at.orders(config).limits, salt="")


def workers(at: Place, config: TrainConfig) -> Any:
    return [spec.worker for spec in at.orders(config).workers]


def overlap(at: Place, config: TrainConfig) -> Any:
    return at.run(config).rank.parts.replica.dense_sync.overlaps


def split(at: Place, config: TrainConfig) -> Any:
    """By which rule a rank's steps have split token copies."""
    generation = at.run(config).rank.generation
    assert generation is not None
    return generation.rule


def transport(at: Place, config: TrainConfig) -> Any:
    """How a rank asks for its collectives."""
    asked: list[bool] = []
    exchange = Group.exchange

    def noting(self: Group, *, shared: bool, timeout_s: float) -> Any:
        asked.append(shared)
        return exchange(self, shared=shared, timeout_s=timeout_s)

    with at.monkeypatch.context() as patch:
        patch.setattr(Group, "exchange", noting)
        at.run(config)
    return asked


def comparisons(at: Place, config: TrainConfig) -> Any:
    """At which steps replicas are compared."""
    from lazarus.runtime.training import between_steps

    count, compare = [0], between_steps.compare

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return compare(*args, **kwargs)

    with at.monkeypatch.context() as patch:
        patch.setattr(between_steps, "compare", counting)
        at.run(config)
    return count[0]


def repairs(at: Place, config: TrainConfig) -> Any:
    """What a rank does with outvoted copies, and what the controller does."""
    between = at.run(config).rank.parts.between
    return between.repairs, at.orders(config).controller.config.on_mismatch


def ray_needs(at: Place, config: TrainConfig) -> Any:
    """What a node of the run needs of a Ray cluster, in words."""
    from lazarus.runtime.launch import ray_launcher

    free = {"CPU": 0.5}
    node = ray_launcher.RayNode(id="a", host="h", free=free, labels={"disk": "slow"})
    with at.monkeypatch.context() as patch:
        joined = SimpleNamespace(is_own=False, host="127.0.0.1")
        patch.setattr(ray_launcher.RayLauncher, "_connect", lambda self, home: joined)
        patch.setattr(ray_launcher.RayLauncher, "_spawn", lambda self, *args: None)
        patch.setattr(ray_launcher, "total_gpus", lambda: 0.0)
        patch.setattr(ray_launcher, "Wishes", lambda name: None)
        launcher = ray_launcher.RayLauncher(lambda name, cause: None, config, home=None)
    launcher._places.update([node])
    return launcher._places.shortage(), launcher._places.machines()


def launcher(at: Place, config: TrainConfig) -> Any:
    made: list[Any] = []
    with at.monkeypatch.context() as patch:
        patch.setattr(choose_launcher, "ProcessLauncher", lambda on_exit, **kw: made.append(kw))
        launcher_of(config, lambda name, cause: None)
    return made


def chaos(at: Place, config: TrainConfig) -> Any:
    """Whether the driver draws faults once the run has started."""
    drawn: list[Any] = []
    spec = at.orders(config).spec
    with at.monkeypatch.context() as patch:
        patch.setattr(driver_of_runs, "Chaos", lambda chaos, driver: drawn.append(chaos))
        driver = driver_of_runs.Driver(
            spec, lambda on_exit: SimpleNamespace(is_fixed=True), lambda e: None, lambda t: None
        )
        driver._recorded({"event": "run_started"})
    return drawn


def faults(at: Place, config: TrainConfig) -> Any:
    """Who is told what to inject, and what to look for at the end."""
    orders = at.orders(config)
    return orders.workers[0].faults, orders.controller.config.faults


def keeper_story(at: Place, config: TrainConfig) -> Any:
    """What is ordered of the node's keeper, and whether there is one."""
    return begun_saves(at, config), at.orders(config).keeper is None


def begun_saves(at: Place, config: TrainConfig) -> list[Any]:
    """What a rank orders of its keeper: which records are copied, and which are written."""
    from lazarus.runtime.saving import saver

    begun: list[Any] = []

    class Noting:
        def __init__(self, link: Any) -> None: ...

        def begin(self, request: Any) -> bool:
            items = [
                (i.key.layer, i.key.expert, i.key.parts, i.persist, i.copy_to)
                for i in request.items
            ]
            begun.append((request.step, items))
            return True

        def wait_before_apply(self) -> float:
            return 0.0

        def rate(self) -> None:
            return None

        def close(self) -> None: ...

    plan_save = saver.plan_save

    def on_two_nodes(selection: Any, **given: Any) -> Any:
        """As if there were another node, which holds nothing."""
        begun.append(
            plan_save(selection, **{**given, "ranks_of": lambda x, e: (0,), "node_of_rank": [0, 1]})
        )
        return plan_save(selection, **given)

    with at.monkeypatch.context() as patch:
        patch.setattr(saver, "Snapshotter", Noting)
        patch.setattr(saver, "plan_save", on_two_nodes)
        at.run(config, keeper=at.keeper.address)
    return begun


def checkpoint_place(at: Place, config: TrainConfig) -> Any:
    orders = at.orders(config)
    return orders.controller.config.checkpoint_url, orders.workers[0].checkpoint_url


def kept(at: Place, config: TrainConfig) -> Any:
    return at.orders(config).controller.keep_checkpoints


def credentials(at: Place, config: TrainConfig) -> Any:
    """What every process of the run is given, or why nothing is.

    A random secret is none that could be compared.
    """
    try:
        orders = at.orders(config)
    except ConfigError as problem:
        return str(problem)
    keeper = orders.keeper
    assert keeper is not None
    found = orders.controller.credentials
    assert orders.workers[0].credentials == keeper.credentials == found
    secret = config.security.secret_file and found.secret
    return secret, found.key, found.cert, found.ca, found.tls_name


def hosts(at: Place, config: TrainConfig) -> Any:
    return own_hosts(config)


def joins(at: Place, config: TrainConfig) -> Any:
    return joins_cluster(replace(config, cluster=replace(config.cluster, launcher="ray")))


def folder(at: Place, config: TrainConfig) -> Any:
    place = open_place(config, resume=None)
    place.leave()
    return place.folder


def run_id(at: Place, config: TrainConfig) -> Any:
    return at.orders(config).controller.config.run_id.rpartition("-")[0]


def policies(at: Place, config: TrainConfig) -> Any:
    found = policies_of(config, placement=None, recovery=None)
    return type(found.placement), type(found.recovery)


def time_limits(at: Place, config: TrainConfig) -> Any:
    control, policy = (
        at.orders(config).controller.config,
        policies_of(config, placement=None, recovery=None),
    )
    return control.plan_limit_s, policy.placement._stranger._limit_s  # type: ignore[attr-defined]


def timeouts(at: Place, config: TrainConfig) -> Any:
    orders = at.orders(config)
    return (
        orders.controller.config.timeouts,
        orders.workers[0].config.timeouts,
        orders.limits.rest_s,
    )


def gauges(at: Place, config: TrainConfig) -> Any:
    made: list[Any] = []
    with at.monkeypatch.context() as patch:
        patch.setattr(train_command, "RayMetrics", lambda *args, **kw: made.append(args))
        train_command._ray_metrics(config)
    return made


def callbacks(at: Place, config: TrainConfig) -> Any:
    try:
        return [type(c).__name__ for c in configured(config, run_dir=at.folder)]
    except Exception as problem:  # noqa: BLE001 - a package that is not there is an answer too
        return str(problem)


def progress(at: Place, config: TrainConfig) -> Any:
    """What the command shows, and what the driver says."""
    shown: list[Any] = []
    with at.monkeypatch.context() as patch:
        patch.setattr(trainer, "launcher_of", lambda c, on_exit: SimpleNamespace(is_fixed=True))
        run = trainer._Run(ElasticTrainer(config), open_place(config, resume=None))
        patch.setattr("builtins.print", lambda *args, **kw: shown.append(args))
        run.driver.say("something")
    run._forget()
    return shown, vars(Progress(config.metrics.progress, steps=3))["_mode"]


def ending(at: Place, config: TrainConfig) -> Any:
    """What the driver does at a callback's failure, and behind the run's end."""
    with at.monkeypatch.context() as patch:
        patch.setattr(trainer, "launcher_of", lambda c, on_exit: SimpleNamespace(is_fixed=True))
        run = trainer._Run(ElasticTrainer(config), open_place(config, resume=None))
    run._forget()
    return run._bus._fail, run._leaves_report


def control(name: str) -> Callable[[Place, TrainConfig], Any]:
    """A field that the controller decides by; ``test_every_field`` shows that each one counts."""

    def observed(at: Place, config: TrainConfig) -> Any:
        return getattr(at.orders(config).controller.config, name)

    return observed


# ---- the table ----------------------------------------------------------------------------------


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

"""What the processes of a run are told under a configuration, for the tests of every key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from key_runs import Place

from lazarus import ElasticTrainer, TrainConfig
from lazarus.callbacks import configured
from lazarus.commands import train as train_command
from lazarus.console.progress import Progress
from lazarus.errors import ConfigError
from lazarus.run import trainer
from lazarus.run.control_config import policies_of
from lazarus.run.run_place import open_place
from lazarus.runtime.comm.groups import Group
from lazarus.runtime.driver import driver as driver_of_runs
from lazarus.runtime.launch import choose_launcher
from lazarus.runtime.launch.choose_launcher import joins_cluster, launcher_of, own_hosts
from lazarus.runtime.training import defaults


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

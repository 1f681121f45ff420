"""A run of one rank in this process: the driver's orders, the controller's decisions, a worker.

Everything is the code of a run but processes, streams and clocks: the driver hands its specs to a
launcher that keeps them, ``decide`` is asked directly, and a ``Worker`` obeys in this thread.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace as changed

from lazarus import ElasticTrainer, TrainConfig
from lazarus.control.machine import decide
from lazarus.control.messages import Align, Body, Finalize, FromWorker, Prepare, Resume, RunOver
from lazarus.control.ports import (
    Event,
    Publish,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
    WriteManifest,
    each,
)
from lazarus.control.restart.replay import initial_state
from lazarus.run.run_place import RunPlace, open_place
from lazarus.run.run_spec import prepared
from lazarus.runtime.controller.manifests import ManifestWriter
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.driver.driver import Driver
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.local_nodes import NodePlace
from lazarus.runtime.rpc import codec
from lazarus.runtime.spec import ControllerSpec, RunSpec, WorkerSpec
from lazarus.runtime.worker.process import Worker
from lazarus.runtime.worker.rank import Rank

UNTIMED = {"t", "wall_s", "loss_s", "tokens_per_s", "phases", "total_s", "bytes_s", "host"}


class RecordedError(Exception):
    """The controller's order has been taken down; nothing is started."""


@dataclass
class Recorder:
    """A launcher that starts nothing."""

    host: str = "127.0.0.1"
    bind_host: str = "127.0.0.1"
    is_fixed: bool = True
    place: NodePlace = field(default_factory=lambda: NodePlace(host="127.0.0.1"))
    controllers: list[ControllerSpec] = field(default_factory=list)
    keepers: list[KeeperConfig | None] = field(default_factory=list)
    workers: list[WorkerSpec] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def start_controller(self, spec: ControllerSpec, *, timeout_s: float) -> int:
        self.controllers.append(spec)
        self.waits.append(timeout_s)
        raise RecordedError

    def open_node(
        self, key: str, machine: str, *, keeper: KeeperConfig | None, folder: Path
    ) -> NodePlace:
        folder.mkdir(parents=True, exist_ok=True)
        self.keepers.append(keeper)
        return self.place

    def start_workers(self, specs: Sequence[WorkerSpec]) -> None:
        self.workers += specs

    def machines(self) -> tuple[Any, ...]:
        return ()

    def close_node(self, key: str) -> None: ...

    def kill(self, name: str) -> None: ...

    def close(self, *, grace_s: float) -> None: ...


@dataclass
class Orders:
    """What the driver of a run tells its processes."""

    spec: RunSpec
    limits: Any
    controller: ControllerSpec
    keeper: KeeperConfig | None
    workers: list[WorkerSpec]
    startup_s: float


def spec_of(trainer: ElasticTrainer, place: RunPlace, scratch: Path) -> RunSpec:
    return prepared(
        place,
        policies=trainer.policies,
        faults=trainer.faults,
        user=trainer.user,
        scratch=scratch,
    )


def orders_of(spec: RunSpec, *, place: NodePlace | None = None) -> Orders:
    """One node's."""
    recorder = Recorder()
    if place is not None:
        recorder.place = place
    driver = Driver(spec, lambda on_exit: recorder, lambda event: None, lambda text: None)
    with suppress(RecordedError):
        driver._start()
    driver._address = "127.0.0.1:1"
    driver.bring_up("n0", "here")
    return Orders(
        spec=spec,
        limits=driver._nodes._fleet.limits,
        controller=recorder.controllers[0],
        keeper=recorder.keepers[0],
        workers=recorder.workers,
        startup_s=recorder.waits[0],
    )


class OneRank:
    """The run of one rank, to its end."""

    def __init__(self, orders: Orders, store: RendezvousStore) -> None:
        self.orders, self._store = orders, store
        self.worker = Worker(orders.workers[0])
        self.state = initial_state(orders.controller.config, term=1, now_s=0.0)
        self.events: list[dict[str, Any]] = []
        self.told: list[Body] = []
        self.over: RunOver | None = None
        self._queue: deque[Event] = deque()
        self._manifests = ManifestWriter(
            orders.controller, self._queue.append, on_death=lambda name, problem: None
        )

    def run(self, *, ticks: int = 300) -> OneRank:
        worker, at_s = self.worker, 0.0
        hello = worker._hello()
        self._queue.append(WorkerSaid(worker=hello.worker, body=hello, at_s=at_s))
        try:
            while self.over is None and ticks:
                if not self._queue:
                    ticks, at_s = ticks - 1, at_s + 0.05
                    self._queue.append(Tick(at_s=at_s))
                self._decide(self._queue.popleft(), at_s)
        finally:
            self._manifests.close()
            if worker._rank is not None:
                worker._rank.release()
                worker._rank.close()
        assert self.over is not None, [type(b).__name__ for b in self.told]
        return self

    def _decide(self, event: Event, at_s: float) -> None:
        self.state, commands = decide(self.state, event)
        for command in each(commands):
            match command:
                case Publish():
                    fields = {k: v for k, v in command.fields.items() if k not in UNTIMED}
                    self.events.append({"event": command.event, **fields})
                case Tell(body=body):
                    self._tell(body)
                    self._hear(at_s)
                case TellDriver(body=RunOver() as over):
                    self.over = over
                case WriteManifest():
                    self._queue.append(self._manifests._done(command))

    def _tell(self, body: Body) -> None:
        self.told.append(body)
        worker = self.worker
        if isinstance(body, Prepare):
            body = changed(body, store=self._store.address)
        if not isinstance(body, Align | Prepare | Resume | Finalize):
            worker._on_message(1, body)
            return
        if worker._rank is None:
            worker._observer.add_faults(worker._spec.faults, node=0, rank=0)
            worker._rank = worker._build()
            worker._building = False
        worker._term = 1
        worker._obey(worker._rank, body)

    def _hear(self, at_s: float) -> None:
        outbox = self.worker._link._outbox
        while not outbox.empty():
            data = outbox.get()
            assert data is not None
            body = codec.decode(FromWorker, data).body
            self._queue.append(WorkerSaid(worker=self.worker._spec.worker, body=body, at_s=at_s))

    @property
    def rank(self) -> Rank:
        """What carried out the orders, in the state in which the run left it."""
        assert self.worker._rank is not None
        return self.worker._rank

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step_committed")]


def text_of(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def one_run(config: TrainConfig, scratch: Path, store: RendezvousStore, **user: Any) -> OneRank:
    """A run in its own folder."""
    place = open_place(config, resume=None)
    try:
        spec = spec_of(ElasticTrainer(place.config, **user), place, scratch)
        return OneRank(orders_of(spec), store).run()
    finally:
        place.leave()

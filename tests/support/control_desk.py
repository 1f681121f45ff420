"""A controller and workers that answer it at once: one layer, one slot a node, no processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from record_checks import check_event

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Control, ControlConfig, Phase
from lazarus.control.machine import decide
from lazarus.control.messages import (
    Align,
    Aligned,
    Body,
    Fence,
    Heartbeat,
    Held,
    Hello,
    Pause,
    Paused,
    Prepare,
    Ready,
    Report,
    Resume,
    RunOver,
    ShareReported,
    SnapshotHeld,
    Vector,
)
from lazarus.control.ports import (
    Command,
    Journal,
    ManifestDone,
    Publish,
    Stored,
    StreamClosed,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
)
from lazarus.control.restart.replay import initial_state
from lazarus.control.vector import VectorLayout, contribution
from placement import Plan

EXPERTS = 3  # one slot a node: each expert lives on one node alone
SOUND, BAD = 5, 6  # checksums of an expert
REPLICATED = {"slots_per_node": 2, "min_replicas": 2}
S = 10.0  # the tolerated stall of CALM
CALM: dict[str, Any] = {"timeouts": derive_timeouts(S)} | REPLICATED


class Desk:
    """Workers that answer every order at once, except where a test holds an answer back."""

    def __init__(
        self, *, nodes: int = 3, deaf_at_first: tuple[str, ...] = (), **config: Any
    ) -> None:
        options: dict[str, Any] = {
            "steps": 100,
            "nodes": nodes,
            "slots_per_node": None,
            "min_replicas": 1,
            "spare_losses": 0,
            "checkpoint_url": "/ckpt",
            "partial_checkpoints": False,
        }
        self.state: Control = initial_state(ControlConfig(**(options | config)), term=1, now_s=0.0)
        self.now_s = 0.0
        self.log: list[Command] = []
        self.committed = dict.fromkeys((f"w{i}" for i in range(nodes)), 0)
        self.entered = dict.fromkeys(self.committed, 0)
        self.held: dict[str, tuple[int, ...]] = dict.fromkeys(self.committed, ())
        self.plans: dict[str, Plan] = {}
        self.snaps: dict[str, tuple[SnapshotHeld, ...]] = {}  # what each node's keeper holds
        self.deaf: set[str] = set(deaf_at_first)  # orders by type that nobody answers
        for worker in self.committed:
            self.say(worker, self.hello(worker))

    def hello(self, worker: str) -> Hello:
        """How a worker introduces itself."""
        return Hello(worker=worker, node_key=f"n{worker[1:]}", keeper=f"{worker}:1")

    def join(self, *workers: str) -> None:
        """More workers come, each the only one of its node."""
        for worker in workers:
            self.committed[worker] = self.entered[worker] = 0
            self.held[worker] = ()
            self.say(worker, self.hello(worker))

    def beat(self, *, waiting: bool = False) -> Heartbeat:
        """A sign of life that says that nothing has moved."""
        return Heartbeat(generation=self.state.resumed, step=self.state.step, waiting=waiting)

    def say(self, worker: str, body: Body) -> None:
        self.feed(WorkerSaid(worker=worker, body=body, at_s=self.now_s))

    def feed(self, event: Any) -> None:
        self.state, commands = decide(self.state, event)
        self.log += commands
        for command in commands:
            if isinstance(command, Publish):
                check_event(command)
            if isinstance(command, Tell) and type(command.body).__name__ not in self.deaf:
                self._answer(command.worker, command.body)

    def tick(self, seconds: float = 0.2) -> None:
        self.now_s += seconds
        self.feed(Tick(at_s=self.now_s))

    def answer(self, kind: type) -> None:
        """What nobody has answered so far, all answer now."""
        self.deaf.discard(kind.__name__)
        for command in self.of(Tell):
            newest = getattr(command.body, "generation", -1) == self.state.generation
            if isinstance(command.body, kind) and newest:
                self._answer(command.worker, command.body)

    def _answer(self, worker: str, body: Body) -> None:
        at = self.committed[worker]
        match body:
            case Fence(generation=generation):
                entered = self.entered[worker]
                report = Report(generation=generation, committed=at, prepared=at, entered=entered)
                self.say(worker, report)
            case Align(generation=generation, step=step):
                self.committed[worker] = step
                self.say(worker, self.aligned(worker, generation))
            case Prepare(generation=generation):
                plan = Plan.from_json(body.plan)
                self.plans[worker] = plan
                history = self.history(body.step) if body.reload else b""
                ready = Ready(generation=generation, plan_digest=plan.digest, history=history)
                self.say(worker, ready)
            case Resume(generation=generation, step=step):
                rank = list(self.state.standing.seats).index(worker)
                plan = self.plans[worker]
                self.held[worker] = tuple(e for e in range(EXPERTS) if rank in plan.ranks_of(0, e))
                self.committed[worker], self.entered[worker] = step, generation

    def history(self, step: int) -> bytes:
        return np.full((3, 1, EXPERTS), 8.0 * step).astype("<f8").tobytes()

    def aligned(self, worker: str, generation: int) -> Aligned:
        held = (Held(layer=0, experts=self.held[worker]),) if self.held[worker] else ()
        step = self.committed[worker]
        return Aligned(
            generation=generation,
            step=step,
            history=self.history(step),
            held=held,
            num_layers=1,
            num_experts=EXPERTS,
            top_k=1,
            expert_bytes=1,
            scalars="{}",
            snapshots=self.snaps.get(worker, ()),
        )

    def vector(self, step: int, *, own_s: Mapping[int, float] | None = None) -> Vector:
        """What all ranks say of one step; ``own_s``: seconds of own compute of some ranks."""
        seats = self.state.standing.seats
        layout = VectorLayout(world_size=len(seats), num_layers=1, num_experts=EXPERTS)
        lanes = sum(
            contribution(
                layout,
                rank=rank,
                generation=self.state.resumed,
                step=step,
                samples=1,
                count=8.0,
                sample_hash=1,
                loss_sum=1.0,
                aux_sum=0.0,
                found_inf=False,
                pause=False,
                own_s=(own_s or {}).get(rank, 0.01),
            )
            for rank in range(len(seats))
        )
        assert isinstance(lanes, np.ndarray)
        lanes[layout.counts] = 8.0
        return Vector(
            generation=self.state.resumed,
            step=step,
            lanes=lanes.astype("<f8").tobytes(),
            wall_s=0.1,
        )

    def commit(self, step: int, *, own_s: Mapping[int, float] | None = None) -> None:
        """Everybody commits one step."""
        for worker in self.state.standing.seats:
            self.committed[worker] = step
        self.say(self.state.standing.seats[0], self.vector(step, own_s=own_s))
        self.tick()

    def pause(self) -> None:
        """All ranks stop after the newest step, as they were told."""
        order = self.told(Pause)[-1]
        for worker in self.state.standing.seats:
            self.say(worker, Paused(generation=order.generation, step=self.state.step))

    def share(
        self,
        worker: str,
        step: int,
        *,
        generation: int = 1,
        ok: bool = True,
        measured: dict[str, float] | None = None,
    ) -> None:
        """One rank's share is durable, or is not."""
        error = "" if ok else "disk full"
        record: dict[str, Any] = {"kind": "persist", "ok": ok, "files": [], "error": error}
        if measured is not None:
            record["measured"] = measured
        body = ShareReported(generation=generation, step=step, record=json.dumps(record))
        self.say(worker, body)

    def lose(self, *workers: str) -> None:
        for worker in workers:
            self.feed(StreamClosed(worker=worker, at_s=self.now_s))

    def written(self, step: int, *, full: bool = True, error: str = "") -> None:
        """The manifest of a step stands, or could not be written."""
        versions = tuple(
            Stored(layer=0, expert=e, generation=1, step=step, routed=8 * step)
            for e in range(EXPERTS)
        )
        done = ManifestDone(
            generation=1,
            step=step,
            at_s=self.now_s,
            standing=((1, step, full),),
            stored=versions,
            error=error,
        )
        self.feed(done)

    def of(self, kind: type) -> list[Any]:
        return [c for c in self.log if isinstance(c, kind)]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [dict(c.fields) for c in self.of(Publish) if c.event == name]

    def last_resume(self) -> Resume:
        found: Resume = self.told(Resume)[-1]
        return found

    def told(self, kind: type) -> list[Any]:
        return [c.body for c in self.of(Tell) if isinstance(c.body, kind)]


def running(**config: Any) -> Desk:
    desk = Desk(**config)
    assert desk.state.phase is Phase.RUNNING
    for step in range(1, 9):
        desk.commit(step)
    return desk


class Flipped(Desk):
    """Every expert is on every node; some copies, or the dense state, have other bits."""

    bad_dense: tuple[str, ...] = ()
    bad_expert: tuple[str, ...] = ()

    def aligned(self, worker: str, generation: int) -> Aligned:
        body = super().aligned(worker, generation)
        experts = body.held[0].experts if body.held else ()
        sums = tuple(BAD if e == 1 and worker in self.bad_expert else SOUND for e in experts)
        return replace_body(
            body,
            held=(Held(layer=0, experts=experts, sums=sums),) if experts else (),
            dense_digest="bad" if worker in self.bad_dense else "good",
            scalars=json.dumps({"by": worker}),
        )


def replace_body(body: Aligned, **changes: object) -> Aligned:
    fields = {name: getattr(body, name) for name in body.__struct_fields__}
    return Aligned(**(fields | changes))


def journal_of(desk: Desk) -> list[dict[str, Any]]:
    """What the controller of a desk has journaled, as it is read back."""
    return [json.loads(json.dumps(dict(command.entry))) for command in desk.of(Journal)]


def over(desk: Desk) -> RunOver:
    """The end of the run, which the driver was told once."""
    (found,) = [c.body for c in desk.of(TellDriver) if isinstance(c.body, RunOver)]
    return found


def refused(desk: Desk) -> int:
    """How many messages the controller has refused."""
    return desk.state.rejected.num_refused

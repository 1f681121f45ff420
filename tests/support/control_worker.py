"""One simulated node: the real ledger, a training thread and a control thread in small steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from control_basics import EXPERTS, LAYERS, Expert, digest, need, vector_of
from control_invariants import check_apart, check_redo, compare

from lazarus.control.cluster.state import Phase
from lazarus.control.messages import (
    Ack,
    Align,
    Aligned,
    Body,
    Depart,
    DigestItem,
    DigestPart,
    Fence,
    Fenced,
    Finalize,
    Finalized,
    Heartbeat,
    Held,
    Hello,
    LeaveRequest,
    Pause,
    Paused,
    Prepare,
    Ready,
    Resume,
    Suspicion,
    Vector,
    Welcome,
)
from lazarus.control.vector import (
    VectorLayout,
    advance_history,
    decode,
    start_history,
)
from lazarus.errors import FencedError
from lazarus.runtime.fence.ledger import StepLedger
from placement import Plan

if TYPE_CHECKING:
    from control_world import World

CLOSED = object()  # the end of a stream, behind all that was still in it


@dataclass
class Barrier:
    """A collective of one generation: its result is there once everybody has entered."""

    names: tuple[str, ...]
    entered: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.entered) == len(self.names)


class SimWorker:
    """One node with one rank; ``advance`` is its training thread, ``hear`` its control thread."""

    def __init__(self, world: World, key: str) -> None:
        self.world, self.key, self.name = world, key, f"{key}.0"
        self.ledger = StepLedger()
        self.alive, self.stopped, self.stalled = True, False, False
        self.cut = False  # the driver may not reach it either
        self.inbox: deque[tuple[int, Body]] = deque()
        self.outbox: deque[Any] = deque()
        self.orders: deque[Body] = deque()
        self.connected, self.term = False, 0
        self.chains = {0: digest("init")}
        self.history = start_history(LAYERS, EXPERTS)
        self.experts: dict[Expert, str] = {}
        self.doing: Callable[[], None] | None = None
        self.waiting = False
        self.seats: tuple[str, ...] = ()
        self.pending: tuple[Prepare, Plan, dict[Expert, str]] | None = None
        self.pause_of = 0
        self.leaving = False
        self.progress = 0
        self.acked = 0
        self.aligned = 0
        self.reported = 0
        self.beat_s = -1.0
        self.last_words: Body | None = None

    # ---- control thread ------------------------------------------------------------------------

    def say(self, body: Body) -> None:
        if self.connected:
            self.outbox.append(body)

    def connect(self) -> None:
        if self.connected or not self.alive or not self.world.up:
            return
        ledger = self.ledger
        self.connected = True
        self.outbox.append(
            Hello(
                worker=self.name,
                node_key=self.key,
                term=self.term,
                generation=ledger.gen,
                fence=ledger.fence,
                committed=ledger.decided,
            )
        )

    def hear(self) -> None:
        if not self.inbox:
            return
        term, body = self.inbox.popleft()
        if term < self.term:
            return
        if term > self.term:
            self.term = term
            for vector in self.ledger.unacknowledged(above=self.acked):
                self.say(vector)
            if self.leaving:
                self.say(LeaveRequest(generation=self.ledger.gen))
            if self.last_words is not None:
                self.say(self.last_words)
        match body:
            case Welcome():
                pass
            case Fence(generation=generation):
                report = self.ledger.raise_fence(generation, lambda: None)
                if report is not None:
                    self.reported = generation
                    self.say(report)
            case Pause(generation=generation):
                self.pause_of = max(self.pause_of, generation)
            case Ack(step=step):
                self.acked = step
                self.ledger.acknowledge(step)
            case Depart() | Fenced():
                self.world.kill(self, keep=True)
            case _:
                self.orders.append(body)

    def beat(self, now: float) -> None:
        self.beat_s = now
        self.say(
            Heartbeat(
                generation=self.ledger.gen,
                step=0,
                progress=self.progress,
                waiting=self.waiting,
                acked=self.acked,
            )
        )

    # ---- training thread -----------------------------------------------------------------------

    def advance(self) -> None:
        """One small step of the training thread; any other thread may run before the next one."""
        if self.stalled and not self.waiting and self.world.state.phase is not Phase.FINALIZING:
            return  # a thread inside a collective is not stuck, it waits
        self.progress += 1
        if self.doing is not None:
            self.doing()
        elif self.orders:
            order = self.orders.popleft()
            if getattr(order, "generation", 0) == self.ledger.fence:
                self.doing = lambda: self._obey(order)

    def _obey(self, order: Body) -> None:
        self.doing = None
        match order:
            case Align():
                self._align(order)
            case Prepare():
                group = self.world.group("prepare", order.generation, order.feeders)
                group.entered[self.name] = dict(self.experts), self.chains, self.history
                self.doing = lambda: self._prepare(order, group)
            case Resume():
                self._resume(order)
            case Finalize():
                items = (DigestItem(name=self.name, sha256=self.chain.encode()),)
                self.say(DigestPart(generation=order.generation, step=order.step, items=items))
                self.say(Finalized(generation=order.generation, step=order.step))

    @property
    def chain(self) -> str:
        return self.chains[self.ledger.committed]

    def _align(self, order: Align) -> None:
        self.last_words = None
        ledger = self.ledger
        if order.reload:
            self._reload(order)
        elif order.commit and ledger.decided < order.step:
            need(ledger.prepared == order.step, "I7", f"{self.name} told to commit unprepared")
            vector = Vector(generation=ledger.gen, step=order.step, lanes=order.lanes)
            ledger.accept(vector)
            self._apply(vector)
        else:
            check_redo(self.world, self, order)
            ledger.withdraw()
        self.pending = None
        self.aligned = order.generation
        self.say(self._aligned(order))

    def _reload(self, order: Align) -> None:
        """Stand where a checkpoint stands, with nothing that was held before."""
        chains, history = self.world.stored[order.step][1:]
        self.chains, self.history, self.experts = dict(chains), history.copy(), {}
        self.acked = order.step
        self.ledger.start_from(order.step)

    def _aligned(self, order: Align) -> Aligned:
        held = tuple(
            Held(
                layer=at,
                experts=tuple(e for x, e in sorted(self.experts) if x == at),
                sums=tuple(1 + int(self.experts[k][:14], 16) for k in sorted(self.experts)),
            )
            for at in range(LAYERS)
        )
        return Aligned(
            generation=order.generation,
            step=self.ledger.committed,
            dense_digest=self.chain,
            history_digest=digest(self.history.tobytes()),
            history=self.history.astype("<f8").tobytes(),
            held=held,
            num_layers=LAYERS,
            num_experts=EXPERTS,
            expert_bytes=1,
            dense_bytes=1,
        )

    def _prepare(self, order: Prepare, group: Barrier) -> None:
        self.waiting = not group.complete
        if self._interrupted(group, order.generation) or not group.complete:
            return
        plan = Plan.from_json(order.plan)
        names = [seat.worker for seat in order.feeders]
        staged = {}
        for move in (*order.moves, *order.moves_behind):
            if names[move.target] == self.name:
                held = group.entered[names[move.source]][0]
                key = (move.layer, move.expert)
                need(key in held, "I12", f"{names[move.source]} was asked for {key}, has it not")
                staged[key] = held[key]
        for restore in order.restores:
            staged[(restore.layer, restore.expert)] = digest("restored", restore, order.step)
        if self.name in {names[i] for i in order.dense_targets}:
            _, chains, history = group.entered[names[order.dense_sources[0]]]
            self.chains, self.history = dict(chains), history.copy()
            if self.aligned != order.generation:  # a joiner: what was outvoted keeps its experts
                self.experts = {}
                self.ledger.start_from(order.step)
        self._idle()
        self.pending = (order, plan, staged)
        self.say(Ready(generation=order.generation, plan_digest=plan.digest))

    def _interrupted(self, group: Barrier, generation: int) -> bool:
        """The fence frees this thread at once; a dead peer gives an error sooner or later."""
        if self.ledger.fence != generation and self.world.rng.random() < 0.5:
            self._idle()
            return True
        peers = [self.world.workers[name] for name in group.names]
        broken = any(not peer.alive or peer.ledger.fence > generation for peer in peers)
        broken = broken or self.world.is_cut_off(self.name, group.names)
        if broken and self.world.rng.random() < 0.5:
            self._idle()
            if self.ledger.fence == generation:
                self.last_words = Suspicion(generation=generation, step=0)
                self.say(self.last_words)
            return True
        return False

    def _idle(self) -> None:
        self.doing, self.waiting = None, False

    def _resume(self, order: Resume) -> None:
        if self.pending is None or self.pending[0].generation != order.generation:
            return
        prepare, plan, staged = self.pending
        self.pending = None
        self.seats = tuple(seat.worker for seat in prepare.seats)
        ranks = plan.expert_of_slot[:, self.seats.index(self.name)]
        wanted = {(at, int(e)) for at in range(LAYERS) for e in ranks[at] if e >= 0}
        have = {**self.experts, **staged}  # an outvoted copy gives way to a sound one
        need(wanted <= set(have), "I12", f"{self.name} resumes without {wanted - set(have)}")
        self.experts = {key: have[key] for key in wanted}
        need(self.ledger.committed == order.step, "I5", f"{self.name} resumes at another step")
        compare(self.world, self, order.generation)
        if not self.ledger.enter(order.generation):
            return
        if order.halt:
            self._pause()
        else:
            self._begin(order.step + 1)

    def _begin(self, step: int) -> None:
        if step > self.world.config.steps:
            self._pause()
        else:
            self.doing = lambda: self._compute(step)

    def _pause(self) -> None:
        self._idle()
        self.last_words = Paused(generation=self.ledger.gen, step=self.ledger.committed)
        self.say(self.last_words)

    def _compute(self, step: int) -> None:
        try:
            self.ledger.check()
        except FencedError:
            self._idle()
            return
        generation = self.ledger.gen
        group = self.world.group("commit", (generation, step), self.seats)
        self.ledger.prepare(step)
        group.entered[self.name] = self.leaving or self.pause_of == generation
        self.doing = lambda: self._barrier(group, generation, step)

    def _barrier(self, group: Barrier, generation: int, step: int) -> None:
        self.waiting = not group.complete
        if self._interrupted(group, generation) or not group.complete:
            return
        pauses = sum(group.entered.values())
        vector = vector_of(seats=len(group.names), generation=generation, step=step, pauses=pauses)
        if not self.ledger.decide(vector):
            self._idle()
            return
        need(self.reported <= generation, "I4", f"{self.name} decided {step} after its report")
        self.world.decided.setdefault(step, {})[self.name] = generation
        self.doing = lambda: self._commit(vector, paused=pauses > 0)

    def _commit(self, vector: Vector, *, paused: bool) -> None:
        self._apply(vector)
        if self.seats[0] == self.name:
            self.say(vector)
        if paused:
            self._pause()
        else:
            self._begin(vector.step + 1)

    def _apply(self, vector: Vector) -> None:
        ledger, step = self.ledger, vector.step
        need(ledger.committed == step - 1, "I2", f"{self.name} applies {step} out of turn")
        lanes = np.frombuffer(vector.lanes, dtype="<f8")
        layout = VectorLayout(world_size=len(self.seats), num_layers=LAYERS, num_experts=EXPERTS)
        self.history = advance_history(self.history, decode(layout, lanes).counts)
        self.chains[step] = digest(self.chain, vector.lanes)
        self.experts = {k: digest(v, vector.lanes) for k, v in self.experts.items()}
        ledger.applied(step)
        check_apart(self.world, self)

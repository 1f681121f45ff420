"""``VirtualRun``: a fleet on a virtual clock, controlled by the production ``decide``.

The fleet feeds events to ``decide`` and carries out the returned commands; it takes no decisions
of its own. Answers of many nodes are entered at once and only the last one goes through ``decide``.
A test compares the result with ``exact=True``, where every answer does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lazarus.control.cluster.roster import workers_of
from lazarus.control.cluster.state import Control, ControlConfig, Phase
from lazarus.control.cluster.transition import Transition
from lazarus.control.machine import decide, decide_at_once
from lazarus.control.messages import (
    Align,
    Body,
    DriverHello,
    Fence,
    Pause,
    Paused,
    Prepare,
    Ready,
    Report,
    Resume,
    RunOver,
)
from lazarus.control.parts.saving import Saving
from lazarus.control.ports import (
    Command,
    DriverSaid,
    Event,
    Publish,
    StreamClosed,
    Tell,
    TellAll,
    TellDriver,
    Tick,
    WorkerSaid,
)
from lazarus.simulate.fleet import answers, bodies
from lazarus.simulate.fleet.agenda import Agenda
from lazarus.simulate.fleet.downtime import PLANNED, RECOVERY, RESTART, WAITING, Downtime
from lazarus.simulate.fleet.training import Training
from lazarus.simulate.inputs.faults import by_number, fleet_of
from lazarus.simulate.rows import FleetPolicy, Row, Setting, Tally

_WITHIN_S = 1e-6


class VirtualRun:
    """One simulated run of one policy under one seed.

    Args:
        setting: The scenario.
        policy: Placement and recovery policy of the run.
        seed: Seed of the faults.
        exact: Send every worker's answer through ``decide``; slow, for tests.
        on_event: Called with every event that the controller publishes.
        on_clock: Called with the virtual time, in seconds since the start of training.
    """

    def __init__(
        self, setting: Setting, *, policy: FleetPolicy, seed: int, exact: bool = False,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_clock: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        costs = setting.costs.changed(policy.overrides or {})
        self._setting, self._policy, self._seed = replace(setting, costs=costs), policy, seed
        self._exact, self._costs, self._on_event, self._on_clock = exact, costs, on_event, on_clock
        self._agenda, self._now = Agenda(), 0.0
        self._start_s = 0.0  # when the first generation resumed
        self._live: set[str] = set()  # nodes
        self._dead: set[str] = set()  # workers of nodes that are gone
        self._told: set[tuple[type[Body], int]] = set()
        self._over = False
        self.tally = Tally()
        self._downtime = Downtime(self.tally)
        self.training = Training(self._setting, self.tally)
        self.state = Control(config=self._config(setting.num_nodes, start_step=0))

    # ---- life ------------------------------------------------------------------------------------

    def run(self) -> Row:
        """Simulate until the horizon or the last wanted step, and return the result."""
        setting = self._setting
        start = fleet_of(setting.faults, setting.num_nodes)
        script = setting.faults.events(
            num_nodes=len(start), horizon_s=setting.horizon_s, seed=self._seed
        )
        self._live = set(start)
        self.state = Control(config=self._config(len(start), start_step=0))
        self._seat(sorted(start, key=by_number))
        for event in script:
            self._agenda.add(event.at_s + self._start_s, event.kind, event.nodes)
        self._loop(setting.horizon_s + self._start_s)
        return self.tally.row(
            setting, policy=self._policy.name, seed=self._seed, wall_s=self._now - self._start_s,
            nodes=len(self._live), first_step_s=self.training.first_step_s,
            decided_by="lazarus.control", config=self.state.config,
        )  # fmt: skip

    def _loop(self, end_s: float) -> None:
        while self._agenda and (next_s := self._agenda.next_s) <= end_s:
            if (done_s := self.training.done_at()) is not None and done_s <= next_s:
                break
            self._next()
            if self._on_clock is not None:
                self._on_clock(self._now - self._start_s)
        done_s = self.training.done_at()
        self._now = min(end_s, done_s) if done_s is not None else end_s
        self.training.progress(self._now)
        self._downtime.run_ends(now_s=self._now)

    def _next(self) -> None:
        self._now, kind, payload = self._agenda.pop()
        getattr(self, f"_on_{kind}")(payload)

    def _config(self, nodes: int, *, start_step: int) -> ControlConfig:
        return answers.control_config(
            self._setting, self._policy, nodes=nodes, start_step=start_step
        )

    # ---- the controller's shell ------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        self.state, commands = (decide if self._exact else decide_at_once)(self.state, event)
        for command in commands:
            if isinstance(command, Tell | TellAll) and self._repeats(command.body):
                continue
            self._carry_out(command)
        transition = self.state.transition
        if transition is not None and transition.held_until_s > self._now:  # by a recovery policy
            self._agenda.add(transition.held_until_s + _WITHIN_S, "tick", None)

    def _say(self, worker: str, body: Body) -> None:
        self._feed(WorkerSaid(worker=worker, body=body, at_s=self._now))

    def _carry_out(self, command: Command) -> None:
        size = len(change.next_nodes) if (change := self.state.transition) else 0
        match command:
            case Tell(body=Fence(generation=g)) | TellAll(body=Fence(generation=g)):
                self._agenda.add(self._now + self._costs.releasing_s(size), "report", g)
            case Tell(body=Align(generation=g)) | TellAll(body=Align(generation=g)):
                self._agenda.add(self._now + self._costs.aligning_s(size), "align", g)
            case Tell(body=Prepare() as order) | TellAll(body=Prepare() as order):
                self._prepare(order)
            case Tell(body=Resume(generation=g)) | TellAll(body=Resume(generation=g)):
                self._resumed(g)
            case Tell(body=Pause(generation=g)) | TellAll(body=Pause(generation=g)):
                self._agenda.add(self.training.step_done_at(self._now), "pause", g)
            case TellDriver(body=RunOver()):
                self._over = True
                self._reborn_if_possible()
            case Publish(t=t, event=name, fields=fields):
                if name == "expert_restored":
                    self.training.billed(float(fields["lost_copies"]))
                if self._on_event is not None:
                    self._on_event({"t": t, "event": name, **fields})
                if name == "quorum_lost" and not fields["nodes"]:
                    # No node is left. The restart is timed here, not by the controller.
                    self.state = replace(self.state, phase=Phase.ENDED)
                    self._over = True
                    self._reborn_if_possible()
            case _:
                pass

    def _repeats(self, body: Body) -> bool:
        """Whether the same command of the same generation was already carried out for a worker."""
        key = (type(body), getattr(body, "generation", -1))
        if key in self._told:
            return key[1] >= 0
        self._told.add(key)
        return False

    # ---- who is there ----------------------------------------------------------------------------

    def _seat(self, keys: list[str]) -> None:
        """Let the first nodes say hello, and run until the first generation trains."""
        hellos = [bodies.hello(key) for key in keys]
        if self._exact or len(hellos) < 3:
            for body in hellos:
                self._say(body.worker, body)
        else:
            self._say(hellos[0].worker, hellos[0])
            self.state = answers.with_nodes(self.state, hellos[:-1])
            self._say(hellos[-1].worker, hellos[-1])
        while not self.training.running and self._agenda:
            self._next()
        self._start_s = self._now if not self._start_s else self._start_s

    def _on_add(self, nodes: tuple[str, ...]) -> None:
        for key in nodes:
            self._live.add(key)
            self._dead.discard(f"{key}.0")
            self._agenda.add(self._now + self._costs.start_s, "hello", key)

    def _on_hello(self, key: str) -> None:
        if key not in self._live:
            return  # lost before it was ready
        if self._over:
            self._reborn_if_possible()
            return
        self.tally.joins += 1
        self._say(f"{key}.0", bodies.hello(key))
        self._agenda.add(self._now + self._setting.join_debounce_s + _WITHIN_S, "tick", None)

    def _on_tick(self, _: None) -> None:
        """Let the controller act on the time; all live workers have sent heartbeats meanwhile."""
        now = self._now
        if not self._exact:  # any event makes ``decide`` start what is due
            self._feed(DriverSaid(body=DriverHello(run=""), at_s=now))
            return
        self.state = answers.with_time(self.state, now_s=now)
        self._feed(Tick(at_s=now))

    def _on_remove(self, nodes: tuple[str, ...]) -> None:
        for key in nodes:
            if key not in self._live:
                continue
            worker = f"{key}.0"
            self._live.discard(key)
            self._dead.add(worker)
            if worker in self.state.standing.seats:
                self.tally.losses += 1
                self.training.stop(self._now)
                self._downtime.begins(RECOVERY, now_s=self._now)
            if worker in self.state.roster.workers:
                self._agenda.add(self._now + self._costs.detect_s, "closed", worker)

    def _on_closed(self, worker: str) -> None:
        self._feed(StreamClosed(worker=worker, at_s=self._now))
        self._note_waiting()

    def _note_waiting(self) -> None:
        if self.state.phase is Phase.HOLDING:
            self._downtime.turns_into(WAITING)

    # ---- answers ---------------------------------------------------------------------------------

    def _absorb(self, name: str, replies: Mapping[str, Body]) -> None:
        """Enter all answers of one phase: the last through ``decide``, the others directly."""
        if self._exact:
            for worker in replies:
                self._say(worker, replies[worker])
            return
        early = dict(replies)
        last = early.popitem()
        self.state = answers.with_early(self.state, name, early)
        self._say(*last)

    def _due(self, generation: int, phase: Phase) -> Transition | None:
        transition = self.state.transition
        current = transition is not None and transition.generation == generation
        return transition if current and self.state.phase is phase else None

    def _alive(self, workers: tuple[str, ...]) -> list[str]:
        """The workers that can still answer; the phase ends only if this is all of them."""
        if self._dead.isdisjoint(workers):
            return list(workers)
        return [w for w in workers if w not in self._dead]

    def _on_report(self, generation: int) -> None:
        if (transition := self._due(generation, Phase.FENCING)) is None:
            return
        step, entered = self.training.step, self.training.generation
        answer = Report(generation=generation, committed=step, prepared=step, entered=entered)
        asked = self._alive(workers_of(self.state, transition.voters + transition.joiners))
        if asked:
            self._absorb("reports", dict.fromkeys(asked, answer))

    def _on_align(self, generation: int) -> None:
        if (transition := self._due(generation, Phase.ALIGNING)) is None:
            return
        snapped = self.training.copies.snapped(alive=set(transition.voters))
        stored, known = self.training.copies.on_storage()
        self.state = answers.with_storage(self.state, stored=stored, checkpoints=known)
        shape = self._setting.shape
        replies = bodies.all_aligned(
            self._alive(workers_of(self.state, transition.voters)),
            held=self.training.held,
            snapshots={self.state.roster.nodes[n].workers[0]: rows for n, rows in snapped.items()},
            generation=generation, step=transition.step, history=self.training.history,
            dense_bytes=shape.dense_bytes, expert_bytes=shape.expert_bytes,
        )  # fmt: skip
        if replies:
            self._absorb("aligned", replies)
        self._note_waiting()

    def _prepare(self, order: Prepare) -> None:
        work = self.training.prepare(order)
        plan_s = self._costs.planning_s(self._setting.shape, len(order.seats))
        self._agenda.add(self._now + plan_s + work.total_s, "ready", (order.generation, work))

    def _on_ready(self, payload: Any) -> None:
        generation, work = payload
        transition = self._due(generation, Phase.PREPARING)
        if transition is None or transition.plan is None:
            return
        reloaded = self.training.history_at(transition.step) if transition.rollback else None
        answer = Ready(
            generation=generation, plan_digest=transition.plan.digest,
            groups_s=work.groups_s, transfer_s=work.transfer_s,
            history=b"" if reloaded is None else reloaded.astype("<f8").tobytes(),
        )  # fmt: skip
        self.training.prepared(work)
        asked = self._alive(tuple(seat.worker for seat in transition.feeders))
        if asked:
            self._absorb("ready", dict.fromkeys(asked, answer))

    def _resumed(self, generation: int) -> None:
        whole = len(self._alive(self.state.standing.seats)) == len(self.state.standing.seats)
        if self.state.standing.rolled == (generation, self.state.step):
            ledger = self.training.go_back(self.state.step, self.state.saving.plt)
            self.state = replace(self.state, saving=replace(self.state.saving, plt=ledger))
        standing = self.state.standing
        assert standing.plan is not None
        self.training.resume(
            self._now, plan=standing.plan, seats=standing.seats, step=self.state.step,
            generation=generation, run=whole,
        )  # fmt: skip
        if whole:
            self._agenda.add(self.training.step_done_at(self._now), "commit", generation)
        self._agenda.add(self._now + self._setting.join_debounce_s + _WITHIN_S, "tick", None)

    def _on_commit(self, generation: int) -> None:
        """The first step after a change is committed, which ends the recovery."""
        if generation != self.state.resumed or not self.training.running:
            return
        self.training.progress(self._now + _WITHIN_S)
        self._commit(self.training.step)
        self._downtime.ends(now_s=self._now)
        self._drift()

    def _drift(self) -> None:
        """Schedule the next update of loads and step time."""
        if (at_s := self.training.next_drift(self._now)) is not None:
            self._agenda.add(at_s, "drift", self.state.resumed)

    def _on_drift(self, generation: int) -> None:
        if generation == self.state.resumed and self.training.running:
            self.training.progress(self._now + _WITHIN_S)
            self.training.renew_step()
            self._commit(self.training.step)
            self._drift()

    def _commit(self, step: int) -> None:
        """Report commits up to ``step``; all but the last are entered into the state directly."""
        first = self.state.step + 1
        if not self._exact and step > first:
            self.state = answers.with_commits(
                self.state, step=step - 1, history=self.training.history
            )
            first = step
        for number in range(first, step + 1):
            body = bodies.vector(
                self.state, step=number, tokens=self._setting.tokens_per_step,
                wall_s=self.training.step_s, at_s=self._now, counts_LE=self.training.history[2],
            )  # fmt: skip
            self._say(self.state.standing.seats[0], body)

    def _on_pause(self, generation: int) -> None:
        """Every rank has stopped at the end of a step, as the controller asked."""
        if generation != self.state.resumed or not self.training.running:
            return
        self.training.progress(self._now + _WITHIN_S)
        self.training.stop(self._now)
        self._downtime.begins(PLANNED, now_s=self._now)
        self._commit(self.training.step)
        answer = Paused(generation=generation, step=self.training.step)
        self._absorb("paused", dict.fromkeys(self.state.standing.seats, answer))

    # ---- after the loss of everything ------------------------------------------------------------

    def _reborn_if_possible(self) -> None:
        """Schedule a restart of an ended run from storage if enough nodes are live."""
        self._downtime.begins(RESTART, now_s=self._now)
        self._downtime.turns_into(RESTART)
        if len(self._live) * (self.state.config.slots_per_node or 1) < self._setting.shape.experts:
            return
        delay_s = self._costs.start_s + self._costs.checkpoint_s(self._setting.shape.total_bytes)
        self._over = False
        self._agenda.add(self._now + delay_s, "reborn", None)

    def _on_reborn(self, _: None) -> None:
        slots = self._policy.slots_per_node or self._setting.slots_per_node
        if len(self._live) * slots < self._setting.shape.experts:
            self._over = True
            return
        self.tally.restarts += 1
        ledger = self.training.start_again(self.state.saving.plt)
        self._told.clear()
        config = self._config(len(self._live), start_step=self.training.step)
        self.state = Control(config=config, started_s=self._now, saving=Saving(plt=ledger))
        for key in sorted(self._live, key=by_number):
            self._say(f"{key}.0", bodies.hello(key))

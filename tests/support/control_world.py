"""A small cluster in one thread: the real ``decide``, simulated processes and streams.

Messages travel in order on each stream and are late at random; processes die, stop and stall at
any point; the controller dies between any two of its commands and comes back from its journal. What
protocol.md calls invariants is checked at every step and raises ``Broken`` with the number.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from control_basics import EXPERTS, LAYERS, Broken, digest, need
from control_invariants import check_decision, check_loss, check_order, check_restart, note_evidence
from control_journal import resumed_state
from control_worker import CLOSED, Barrier, SimWorker
from record_checks import check_event

from lazarus.control import machine
from lazarus.control.cluster import evidence
from lazarus.control.cluster.state import Control, ControlConfig, Phase, fields_of
from lazarus.control.commit.commits import last_words
from lazarus.control.messages import (
    KillNode,
    RunOver,
    StartNode,
    WorkerDied,
)
from lazarus.control.ports import (
    Command,
    Disconnect,
    DriverSaid,
    Event,
    Exit,
    Journal,
    ManifestDone,
    Publish,
    StreamClosed,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
)
from lazarus.control.restart import replay
from lazarus.control.restart.folded import folded_text, unfolded
from lazarus.control.restart.replay import awakened, blank_state, missing_commits
from lazarus.control.vector import start_history


def alike(one: Control, other: Control, name: str) -> bool:
    """Whether two states have the same in a field."""
    a, b = fields_of(one)[name], fields_of(other)[name]
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)


class World:
    """All processes of a run, one random interleaving of them."""

    def __init__(self, rng: Random, config: ControlConfig) -> None:
        self.rng, self.config = rng, config
        self.now = 0.0
        self.workers: dict[str, SimWorker] = {}
        self.groups: dict[tuple[str, Any], Barrier] = {}
        self.values: dict[tuple[int, Any], str] = {}
        self.decided: dict[int, dict[str, int]] = {}
        self.driver_box: deque[Any] = deque()
        self.dead: list[str] = []
        self.to_start = config.nodes
        self.broken_links: list[frozenset[str]] = []
        self.entries: list[dict[str, Any]] = []
        self.replayed = blank_state(config)  # what the entries tell
        self.restarted_at = (0, 0)  # entries before the newest restart, and its step
        self.published: list[Publish] = []
        self.evidence: dict[int, str] = {}
        # Checkpoints on storage: generation, chains and load history by step. 0 is the seed.
        self.stored: dict[int, Any] = {0: (0, {0: digest("init")}, start_history(LAYERS, EXPERTS))}
        self.over: RunOver | None = None
        self.up = True
        self.crash_after: int | None = None  # commands that the controller still carries out
        self.ambushes: list[Callable[[World], bool]] = []  # faults that wait for their moment
        self.flipped: list[tuple[str, tuple[int, int]]] = []  # copies that were corrupted
        self.start_controller()

    # ---- controller ----------------------------------------------------------------------------

    def start_controller(self) -> None:
        self.up, self.crashed = True, False
        ends = [e for e in self.entries if e["kind"] == "end"]
        if ends:
            need(len(ends) == 1, "I14", "the run ended twice")
            event, told = last_words(ends[0])
            if event.event not in {p.event for p in self.published}:
                self._publish(event)
            self.driver_box.append(told.body)
            self.up = False
            return
        self.state = resumed_state(self.entries, self.config, now_s=self.now)
        base, tail = self._folded_somewhere()
        told = {(p.event, p.fields["generation"], p.fields.get("step")) for p in self.published}
        for publish in missing_commits(tail, base, said=lambda *what: what in told):
            self._publish(publish)
        self._journal({"kind": "term", "term": self.state.term, "port": 1})
        news = [item for item in self.driver_box if not isinstance(item, WorkerDied)]
        self.driver_box = deque([*news, *(WorkerDied(worker=name) for name in self.dead)])

    def _folded_somewhere(self) -> tuple[Control, list[dict[str, Any]]]:
        """The journal as a folded state and a tail; together they must tell the same as all of it.

        What is behind the cut must have been said before: the shell folds between two events.
        """
        said = max((p.fields["step"] for p in self.commits()), default=0)
        state, cut = (
            blank_state(self.config),
            Random(len(self.entries)).randrange(len(self.entries) + 1),
        )
        for number, entry in enumerate(self.entries):
            if any(commit["step"] > said for commit in entry.get("commits", ())):
                cut = min(cut, number)
            if number < cut:
                state = replay.replayed(state, entry)
        base = unfolded(json.loads(folded_text(state, known={})), self.config)
        tail = self.entries[cut:]
        again = base
        for entry in tail:
            again = replay.replayed(again, entry)
        again = awakened(again, now_s=self.now)
        odd = [name for name in fields_of(again) if not alike(again, self.state, name)]
        need(not odd, "folded", f"a folded journal tells {odd} differently")
        return base, tail

    def commits(self) -> list[Publish]:
        """Commits that count: what a restart voids is done again."""
        found: list[Publish] = []
        for p in self.published:
            if p.event == "step_committed":
                found.append(p)
            elif p.event == "rolled_back":
                found = [c for c in found if c.fields["step"] <= p.fields["step"]]
        return found

    def persist(self) -> None:
        """A checkpoint of the newest journaled commit stands, if anybody still has its state."""
        step, members = self.journaled(), self.voters()
        at = [w for w in members if w.ledger.committed == step and w.ledger.gen]
        if not self.up or not at or not step or self.state.phase is not Phase.RUNNING:
            return
        owner = at[0]
        chains = {t: c for t, c in owner.chains.items() if t <= step}
        self.stored[step] = (owner.ledger.gen, chains, owner.history.copy())
        standing = tuple((g, t, True) for t, (g, _, _) in sorted(self.stored.items()) if t)
        done = ManifestDone(
            generation=owner.ledger.gen, step=step, at_s=self.now, standing=standing
        )
        self.feed(done)

    def feed(self, event: Event) -> None:
        """One event into the machine; its commands out, unless the controller dies between two."""
        before = self.state
        note_evidence(self, event)
        try:
            self.state, commands = machine.decide(before, event)
        except Broken:
            raise
        except Exception as problem:
            raise Broken("total", f"{type(problem).__name__}: {problem} on {event}") from problem
        check_decision(self, before, event)
        for command in commands:
            if not self.up:
                return
            self._carry_out(command)
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after < 0:
                    self.crash_controller()
        if self.up and self.state.phase is not Phase.ENDED:
            odd = [name for name in evidence.FIELDS if not alike(self.replayed, self.state, name)]
            need(not odd, "replayed", f"the journal tells {odd} differently")

    def _carry_out(self, command: Command) -> None:
        match command:
            case Journal(entry=entry):
                self._journal(dict(entry))
            case Publish():
                self._publish(command)
            case Tell(worker=name, body=body):
                check_order(self, body)
                worker = self.workers.get(name)
                if worker is not None and worker.connected:
                    worker.inbox.append((self.state.term, body))
            case TellDriver(body=body):
                self.driver_box.append(body)
            case Disconnect(worker=name):
                worker = self.workers.get(name)
                if worker is not None:
                    worker.connected = False
            case Exit():
                self.up = False

    def _journal(self, entry: dict[str, Any]) -> None:
        entry = json.loads(json.dumps(entry))
        if entry["kind"] == "claim":
            claims = [e["generation"] for e in self.entries if e["kind"] == "claim"]
            need(entry["generation"] > max(claims, default=0), "I10", f"claimed twice: {entry}")
        if entry["kind"] == "term":
            terms = [e["term"] for e in self.entries if e["kind"] == "term"]
            need(entry["term"] > max(terms, default=0), "I10", "a term was used twice")
        if entry["kind"] == "resume":
            newest = [e for e in self.entries if e["kind"] == "claim"][-1]
            need(entry["generation"] == newest["generation"], "I10", "resumes an older claim")
            if entry["rollback"]:
                check_restart(self, entry)
            need(entry["step"] >= self.journaled(), "I14", f"resumes before a commit: {entry}")
            seated = [self.workers[name] for name in entry["seats"]]
            chains = {w.chains.get(entry["step"]) for w in seated if w.alive}
            need(len(chains) <= 1, "I5", f"members resume with different states: {chains}")
        self.entries.append(entry)
        self.replayed = replay.replayed(self.replayed, entry)

    def journaled(self) -> int:
        """Newest journaled commit that counts."""
        first, step = self.restarted_at
        steps = [c["step"] for e in self.entries[first:] for c in e.get("commits", ())]
        return max(steps, default=step)

    def _publish(self, publish: Publish) -> None:
        check_event(publish)
        if publish.event == "step_committed":
            step = publish.fields["step"]
            need(step == len(self.commits()) + 1, "I6", f"published {step} out of turn")
            need(step <= self.journaled(), "I6", f"step {step} published before its journal entry")
            need(self.decided.get(step), "I6", f"step {step} published, but nobody decided it")
        if publish.event == "node_lost":
            check_loss(self, int(publish.fields["node"]), str(publish.fields["cause"]))
        self.published.append(publish)

    # ---- checks across workers -----------------------------------------------------------------

    def voters(self) -> list[SimWorker]:
        """Living workers of the newest claim."""
        claims = [e for e in self.entries if e["kind"] == "claim"]
        serials = {e["key"]: e["node"] for e in self.entries if e["kind"] == "serial"}
        newest = set(claims[-1]["members"]) if claims else set()
        return [w for w in self.workers.values() if w.alive and serials.get(w.key) in newest]

    # ---- processes -----------------------------------------------------------------------------

    def group(self, kind: str, key: Any, members: Any) -> Barrier:
        names = tuple(m if isinstance(m, str) else m.worker for m in members)
        return self.groups.setdefault((kind, key), Barrier(names=names))

    def start_worker(self) -> None:
        self.to_start -= 1
        worker = SimWorker(self, f"node-{len(self.workers)}")
        self.workers[worker.name] = worker

    def is_cut_off(self, name: str, names: tuple[str, ...]) -> bool:
        """Whether one of its links in a group is broken."""
        return any(name in link and link <= set(names) for link in self.broken_links)

    def kill(self, worker: SimWorker, *, keep: bool = False) -> None:
        """End a process; what it had sent may be lost with it."""
        if not worker.alive:
            return
        worker.alive = False
        while worker.outbox and not keep and self.rng.random() < 0.5:
            worker.outbox.pop()
        if worker.connected:
            worker.outbox.append(CLOSED)
        worker.inbox.clear()
        self.dead.append(worker.name)
        self.driver_box.append(WorkerDied(worker=worker.name))

    def crash_controller(self) -> None:
        """Everything under way is lost, in both directions."""
        self.crash_after = None
        self.up, self.crashed = False, True
        for worker in self.workers.values():
            worker.outbox.clear()
            while worker.inbox and self.rng.random() < 0.5:
                worker.inbox.pop()
            worker.connected = False
        # What it alone had heard of, and had not journaled, nobody need know any more.
        self.evidence = {s: e for s, e in self.evidence.items() if s <= self.journaled()}
        kept = [item for item in self.driver_box if isinstance(item, KillNode | StartNode)]
        self.driver_box = deque(kept)

    # ---- interleaving --------------------------------------------------------------------------

    def deliver(self, worker: SimWorker) -> None:
        if not self.up or not worker.outbox:
            return
        item = worker.outbox.popleft()
        if item is CLOSED:
            worker.connected = False
            self.feed(StreamClosed(worker=worker.name, at_s=self.now))
        else:
            self.feed(WorkerSaid(worker=worker.name, body=item, at_s=self.now))

    def drive(self) -> None:
        """The driver takes one message, from the controller or from its launcher."""
        if not self.driver_box:
            return
        match self.driver_box.popleft():
            case KillNode(node_key=key):
                worker = self.workers[f"{key}.0"]
                if not (worker.cut and self.rng.random() < 0.5):
                    self.kill(worker)
            case StartNode():
                self.to_start += 1
            case RunOver() as over:
                self.over = over
            case WorkerDied() as died if self.up:
                self.feed(DriverSaid(body=died, at_s=self.now))
            case _:
                pass

    def actions(self) -> list[Callable[[], None]]:
        """Everything that may happen next, faults apart."""
        able: list[Callable[[], None]] = []
        for worker in self.workers.values():
            if self.up and worker.outbox:
                able.append(lambda w=worker: self.deliver(w))  # type: ignore[misc]
            if not worker.alive or worker.stopped:
                continue
            if worker.inbox:
                able.append(worker.hear)
            if worker.doing or worker.orders:
                able.append(worker.advance)
            if self.up and not worker.connected:
                able.append(worker.connect)
        ended = self.state.phase is Phase.ENDED
        said = self.driver_box and not isinstance(self.driver_box[0], WorkerDied)
        if self.driver_box and (self.up or ended or said):
            able.append(self.drive)
        if self.to_start > 0:
            able.append(self.start_worker)
        if self.crashed:
            able.append(self.start_controller)
        return able

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers.values():
            alive = worker.alive and not worker.stopped and worker.connected
            if alive and self.now - worker.beat_s > 0.1:
                worker.beat(self.now)

    def turn(self) -> None:
        """One random action."""
        able = self.actions()
        self.pass_time(self.rng.choice((0.0005, 0.002, 0.01)))
        if self.up and (not able or self.rng.random() < 0.08):
            self.pass_time(self.rng.choice((0.01, 0.02, 0.1)))
            self.feed(Tick(at_s=self.now))
        elif able:
            self.rng.choice(able)()

    def hurry(self) -> None:
        """Every message under way arrives."""
        for worker in list(self.workers.values()):
            while worker.alive and worker.inbox and not worker.stopped:
                worker.hear()
            while self.up and worker.outbox:
                self.deliver(worker)

    def settle(self, *, limit: int) -> None:
        """No more faults: everybody gets turns, fairly, until the run is over (I15)."""
        self.crash_after, self.ambushes = None, []
        for _ in range(limit):
            if self.over is not None:
                return
            for action in self.actions():
                action()
            self.hurry()
            self.pass_time(0.02)
            if self.up:
                self.feed(Tick(at_s=self.now))
            able = [w for w in self.workers.values() if w.alive and not w.stopped]
            if self.state.phase in (Phase.HOLDING, Phase.GATHERING) and self.to_start == 0:
                live = sum(not w.leaving and not w.stalled for w in able)
                self.to_start = int(live < self.config.nodes)
        raise Broken(
            "I15",
            f"no end in sight: {self.state.phase}, generation {self.state.generation}, "
            f"step {self.state.step}, {self.state.waiting.hold_reason}",
        )

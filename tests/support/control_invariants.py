"""What protocol.md calls invariants, checked on a simulated cluster; raises ``Broken``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from control_basics import Broken, need

from lazarus.control import machine
from lazarus.control.cluster.state import Control, Phase, fields_of
from lazarus.control.membership.suspicion import AGAIN
from lazarus.control.messages import (
    Align,
    Body,
    Fence,
    Fenced,
    Heartbeat,
    Hello,
    Prepare,
    Report,
    Resume,
    Vector,
)
from lazarus.control.ports import Event, Tick, WorkerSaid

if TYPE_CHECKING:
    from control_worker import SimWorker
    from control_world import World


def note_evidence(world: World, event: Event) -> None:
    if not isinstance(event, WorkerSaid) or event.worker not in world.state.roster.workers:
        return
    match event.body:
        case Vector(generation=generation, step=step) if generation == world.state.resumed:
            world.evidence.setdefault(step, "vector")
        case Report(generation=generation, vectors=vectors):
            transition = world.state.transition
            if transition is None or transition.generation != generation:
                return
            if world.state.roster.workers[event.worker].node in transition.voters:
                world.evidence.update({v.step: "report" for v in vectors})


def check_decision(world: World, before: Control, event: Event) -> None:
    after = world.state
    need(after.generation >= before.generation, "I10", "the generation went back")
    need(after.resumed >= before.resumed, "I10", "the resumed generation went back")
    restarted = after.standing.rolled != before.standing.rolled and not before.standing.members
    need(after.step >= before.step or restarted, "I14", "the journaled commit went back")
    need(not after.waiting.broken, "I7", f"the controller gave up: {after.waiting.hold_reason}")
    need(set(after.standing.members) <= set(after.roster.nodes), "total", "a member is no node")
    stranger = isinstance(event, WorkerSaid) and event.worker not in before.roster.workers
    if stranger and not isinstance(event.body, Hello) and before.phase is not Phase.ENDED:
        due, _ = machine.decide(before, Tick(at_s=event.at_s))
        old, said, ticked = fields_of(before), fields_of(after), fields_of(due)
        same = all(
            said[name] in (old[name], ticked[name])
            for name in ("members", "step", "generation", "phase", "known", "nodes")
        )
        need(same, "I13", f"{event.worker} is heard although it is no member: {event.body}")


def check_restart(world: World, entry: dict[str, Any]) -> None:
    """Only where nobody is left; then what was decided above the checkpoint is void."""
    before = [e for e in world.entries if e["kind"] == "resume"][-1]
    left = set(entry["nodes"]) & set(before["nodes"])
    need(not left, "I14", f"restarts although {left} hold the state")
    newest = max(t for t in world.stored if t <= world.journaled())
    need(entry["step"] == newest, "I14", f"restarts at {entry['step']}, not at {newest}")
    world.restarted_at = (len(world.entries), entry["step"])
    for table in (world.evidence, world.decided, world.stored):
        for step in [t for t in table if t > entry["step"]]:
            del table[step]


def check_loss(world: World, serial: int, cause: str) -> None:
    """Who works, or has nothing to do, is not lost."""
    keys = {e["node"]: e["key"] for e in world.entries if e["kind"] == "serial"}
    lost = world.workers[f"{keys[serial]}.0"]
    if cause == AGAIN:
        ends = frozenset().union(*world.broken_links)
        need(lost.name in ends, "I15", f"{lost.name} is lost for the links of {sorted(ends)}")
    elif cause == "no progress":
        mail = [m for _, m in lost.inbox if not isinstance(m, Fenced)]
        mail += [m for m in lost.outbox if not isinstance(m, Heartbeat)]
        busy = lost.doing is not None or lost.orders or mail or lost.stalled or lost.stopped
        need(busy, "I15", f"{lost.name} is lost for standing still, but has nothing to do")


def check_order(world: World, body: Body) -> None:
    match body:
        case Fence(generation=generation):
            claims = {e["generation"] for e in world.entries if e["kind"] == "claim"}
            need(generation in claims, "I10", f"fence {generation} before its claim")
        case Resume(generation=generation):
            resumes = {e["generation"] for e in world.entries if e["kind"] == "resume"}
            need(generation in resumes, "I10", f"resume {generation} before its entry")
        case Align(step=step, reload=place) if place:
            need(not world.state.standing.members, "I12", f"state is thrown away at {step}")
            need(step in world.stored, "I14", f"restarts at {step}, where nothing stands")
        case Align(step=step):
            newest = max(world.evidence, default=0)
            need(step >= newest, "I7", f"redo of {step + 1} although {newest} is decided")
            need(step >= world.journaled(), "I14", f"aligns at {step}, before a commit")
            need(step == 0 or world.decided.get(step), "I7", f"{step} was never decided")
        case Prepare(restores=restores) if world.state.standing.lineage:
            members = [s.worker for s in body.feeders if s.worker in world.state.standing.seats]
            for restore in restores:
                key = (restore.layer, restore.expert)
                holders = [name for name in members if key in world.workers[name].experts]
                doubtful = any(key == bad for _, bad in world.flipped)  # without a majority
                missing = doubtful or not holders
                need(missing, "I12", f"{key} is restored although {holders} hold it")


def check_redo(world: World, worker: SimWorker, order: Align) -> None:
    if order.generation != worker.ledger.fence or worker not in world.voters():
        return
    for other in world.voters():
        if other.reported >= order.generation and other.ledger.decided > order.step:
            raise Broken("I3", f"{worker.name} redoes what {other.name} has decided")


def check_apart(world: World, worker: SimWorker) -> None:
    for other in world.voters():
        if other.ledger.gen == worker.ledger.gen and other.name in worker.seats:
            apart = abs(other.ledger.committed - worker.ledger.committed)
            need(apart <= 1, "I1", f"{other.name} and {worker.name} are {apart} steps apart")
            both = min(other.ledger.committed, worker.ledger.committed)
            need(other.chains[both] == worker.chains[both], "I1", "two histories")


def compare(world: World, worker: SimWorker, generation: int) -> None:
    for key, value in [*worker.experts.items(), ("dense", worker.chain)]:
        first = world.values.setdefault((generation, key), value)
        need(first == value, "I5", f"{key} differs on {worker.name} in {generation}")

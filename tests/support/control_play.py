"""Random plays on the simulated cluster: faults, rogue messages, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
from control_basics import EXPERTS, LAYERS, Broken, counts_of, digest, need, vector_of
from control_worker import SimWorker
from control_world import World

from lazarus.config.timeouts import derive_timeouts
from lazarus.control import machine
from lazarus.control.cluster.state import ControlConfig, Phase, fields_of
from lazarus.control.messages import (
    Aligned,
    Body,
    DigestPart,
    Finalized,
    LeaveRequest,
    Paused,
    Ready,
    Report,
    Suspicion,
    Vector,
)
from lazarus.control.plans.verdict import slots_for
from lazarus.control.ports import WorkerSaid
from lazarus.control.vector import advance_history, start_history
from placement import PlacementRequest, Plan

FAULTS = (
    "kill",
    "stop",
    "stall",
    "leave",
    "join",
    "controller",
    "torn",
    "freeze",
    "sniper",
    "witness",
    "again",
    "fresh",
    "link",
    "everybody",
    "persist",
)


def config_of(*, nodes: int, steps: int, **more: Any) -> ControlConfig:
    return ControlConfig(
        steps=steps,
        nodes=nodes,
        timeouts=replace(derive_timeouts(1.0), startup_s=2.0, standstill_s=10.0),
        join_debounce_s=0.05,
        quorum_timeout_s=1e6,
        spare_losses=1,
        final_checkpoint=False,
        checkpoint_url="/ckpt",
        **more,
    )


def play(
    seed: int,
    *,
    nodes: int = 4,
    steps: int = 6,
    faults: Sequence[str] = FAULTS,
    num_faults: int = 4,
    turns: int = 500,
    min_nodes: int = 1,
    flips: int = 0,
) -> World:
    """One run to its end; raises ``Broken`` where an invariant does not hold.

    ``flips``: copies of experts that are corrupted silently meanwhile; two at most.
    """
    rng = Random(seed)
    world = World(rng, config_of(nodes=nodes, steps=steps, min_nodes=min_nodes))
    when = {rng.randrange(turns): rng.choice(faults) for _ in range(num_faults)} if faults else {}
    world.ambushes += [flip] * flips
    for turn in range(turns):
        if turn in when:
            strike(world, when[turn])
        if rng.random() < 0.02 and world.up:
            rogue(world)
        for worker in world.workers.values():
            if worker.cut and worker.stopped and rng.random() < 0.01:
                worker.stopped = False
        world.ambushes = [ambush for ambush in world.ambushes if not ambush(world)]
        world.turn()
        if world.over is not None:
            break
    world.settle(limit=1500)
    check_end(world)
    return world


def strike(world: World, kind: str) -> None:
    """One fault, wherever everybody happens to be."""
    rng = world.rng
    if kind in AMBUSHES:
        world.ambushes.append(AMBUSHES[kind])
    elif kind == "join":
        world.to_start += 1
    elif kind == "controller" and world.up:
        world.crash_controller()
    elif kind == "torn":
        world.crash_after = rng.randrange(6)
    elif kind == "persist":
        world.persist()
    victims = [w for w in world.workers.values() if w.alive and not w.stopped]
    if not victims:
        return
    if kind == "everybody":  # a whole zone, with what it had sent or not
        for worker in victims:
            world.kill(worker, keep=rng.random() < 0.3)
        return
    victim = rng.choice(victims)
    if kind == "kill":
        world.kill(victim)
    elif kind == "stop":
        victim.stopped = True
    elif kind == "freeze":  # stopped, out of the driver's reach, and awake again later
        victim.stopped = victim.cut = True
    elif kind == "stall":
        victim.stalled = True
    elif kind == "link":  # two nodes cannot reach each other, for good
        other = rng.choice(victims)
        if other is not victim:
            world.broken_links.append(frozenset({victim.name, other.name}))
    elif kind == "leave":
        victim.leaving = True
        victim.say(LeaveRequest(generation=victim.ledger.gen))


def flip(world: World) -> bool:
    """A bit flips in one copy of an expert, between two changes of members; an ambush."""
    state = world.state
    seated = [world.workers[name] for name in state.standing.seats]
    calm = state.phase is Phase.RUNNING and all(
        w.alive and w.ledger.gen == w.ledger.fence == state.resumed for w in seated
    )
    victims = [w for w in seated if w.experts]
    if not calm or not victims or world.rng.random() < 0.7:
        return False
    victim = world.rng.choice(victims)
    key = world.rng.choice(sorted(victim.experts))
    victim.experts[key] = digest("flipped", victim.experts[key])
    world.flipped.append((victim.name, key))
    return True


def kill_who_decided(world: World) -> bool:
    """The one-sided commit: who has the result dies, its vector sent or not; others lack it."""
    ahead = who_decided_alone(world)
    if not ahead or world.rng.random() < 0.7:
        return False
    world.kill(world.rng.choice(ahead), keep=world.rng.random() < 0.7)
    if world.rng.random() < 0.5:  # the news is quick: the fence comes before anybody else decides
        world.hurry()
    return True


def kill_the_witness(world: World) -> bool:
    """Who alone has decided tells the controller with its last breath."""
    told = [
        worker
        for worker in who_decided_alone(world)
        if any(isinstance(item, Vector) for item in worker.outbox)
    ]
    if not told:
        return False
    world.kill(told[0], keep=True)
    while world.up and told[0].outbox:
        world.deliver(told[0])
    world.hurry()
    return True


def who_decided_alone(world: World) -> list[SimWorker]:
    members = [w for w in world.voters() if w.ledger.gen == world.state.resumed]
    return [w for w in members if any(w.ledger.decided > o.ledger.decided for o in members)]


def kill_in_recovery(world: World) -> bool:
    """A second loss behind the verdict."""
    members = world.voters()
    due = world.state.resumed and world.state.phase in (Phase.ALIGNING, Phase.PREPARING)
    if not due or len(members) < 2 or world.rng.random() < 0.7:
        return False
    world.kill(world.rng.choice(members))
    return True


def kill_before_the_commit(world: World) -> bool:
    """A second loss behind RESUME, before the new generation has committed anything."""
    state, members = world.state, world.voters()
    fresh = (
        state.phase is Phase.RUNNING
        and len(state.standing.lineage) > 1
        and not state.committed.known
    )
    if not fresh or state.standing.lineage[-1][1] != state.step or len(members) < 2:
        return False
    world.kill(world.rng.choice(members))
    return True


AMBUSHES: Mapping[str, Callable[[World], bool]] = {
    "sniper": kill_who_decided,
    "witness": kill_the_witness,
    "again": kill_in_recovery,
    "fresh": kill_before_the_commit,
}


def rogue(world: World) -> None:
    """A message of another generation or of a stranger must change nothing (I11, I13)."""
    rng, state = world.rng, world.state
    if state.phase is Phase.ENDED:
        return
    before = state
    for _ in range(3):  # whatever is due by now comes first
        before = machine.decide(before, WorkerSaid(worker="", body=Body(), at_s=world.now))[0]
    current = {state.resumed, state.generation, before.generation}
    generation = rng.choice([g for g in range(state.generation + 3) if g not in current])
    step = rng.randrange(world.config.steps + 2)
    worker = rng.choice([*world.workers, "stranger.0"])
    if worker not in state.roster.workers:  # whoever was left out is not read, whatever it says
        generation = rng.choice([generation, *current])
    body = stale_body(rng, generation=generation, step=step)
    said = WorkerSaid(worker=worker, body=body, at_s=world.now)
    try:
        after, commands = machine.decide(before, said)
    except Exception as problem:
        raise Broken("I11", f"{body} raises {problem!r}") from problem
    need(not commands, "I11", f"{body} of generation {generation} has the effect {commands}")
    for name in (
        "phase",
        "generation",
        "resumed",
        "step",
        "members",
        "seats",
        "nodes",
        "known",
        "paused",
        "suspicion_s",
        "transition",
        "timeline",
        "finalized",
        "digests",
        "digest",
        "lineage",
    ):
        old, new = fields_of(before)[name], fields_of(after)[name]
        need(old is new or old == new, "I11", f"{body} of generation {generation} changes {name}")


def stale_body(rng: Random, *, generation: int, step: int) -> Body:
    """Any message that carries a generation."""
    vector = vector_of(seats=2, generation=generation, step=step, pauses=0)
    return rng.choice(
        [
            vector,
            Report(generation=generation, committed=step, prepared=step + 1, vectors=(vector,)),
            Aligned(generation=generation, step=step, num_layers=LAYERS, num_experts=EXPERTS),
            Ready(generation=generation, plan_digest="x"),
            Paused(generation=generation, step=step),
            Suspicion(generation=generation, step=step),
            DigestPart(generation=generation, step=step),
            Finalized(generation=generation, step=step),
        ]
    )


def check_end(world: World) -> None:
    """What the record and the survivors must say when the run is over."""
    over = world.over
    assert over is not None
    steps = [p.fields["step"] for p in world.commits()]
    why = "" if over.failure is None else over.failure.message
    need(over.status == "finished", "I15", f"ended without need: {why}")
    need(steps == list(range(1, world.config.steps + 1)), "I6", f"published {steps}")
    check_plans(world)


def check_plans(world: World) -> None:
    """I8: plans are a fold over (step, members) of committed steps alone."""
    base: Plan | None = None
    newest: Plan | None = None
    for entry in world.entries:
        if entry["kind"] == "resume":
            newest = Plan.from_dict(entry["plan"])
            expected = fold_plan(world, base, entry["nodes"], entry["step"])
            generation = entry["generation"]
            need(newest.digest == expected.digest, "I8", f"plan of generation {generation}")
            base = newest if base is None else base
        elif entry["kind"] == "commits":
            base = newest


def fold_plan(world: World, base: Plan | None, nodes: Sequence[int], step: int) -> Plan:
    config = world.config
    history = start_history(LAYERS, EXPERTS)
    for t in range(1, step + 1):
        history = advance_history(history, counts_of(t))
    slots = slots_for(
        num_nodes=len(nodes),
        num_experts=EXPERTS,
        configured=config.slots_per_node,
        started_nodes=config.nodes,
        min_replicas=config.min_replicas,
        spare_losses=config.spare_losses,
    )
    request = PlacementRequest(
        load=np.asarray(history[0]),
        num_nodes=len(nodes),
        slots_per_node=slots,
        min_replicas=min(config.min_replicas, len(nodes)),
        node_ids=tuple(nodes),
        resilience_weight=config.resilience_weight,
    )
    gone = frozenset(base.node_ids) - set(nodes) if base else frozenset()
    return config.placement(request, previous=base, lost=gone)

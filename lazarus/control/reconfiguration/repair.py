"""Replicas that differ: majority vote, repair, and eviction of nodes outvoted too often. PURE.

State that differs from the majority's is outvoted. It is repaired from the majority, and until then
is neither the source of a transfer nor of the load history that a plan uses. The controller
remembers outvoted state until a RESUME, since the ranks of the majority may die before the repair.
Without a majority there is no way to tell which state is right: an expert then counts as lost, and
if the dense state differs, all state is rolled back to the newest checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.cluster.transition import Transition
from lazarus.control.commit import commits
from lazarus.control.messages import Aligned, Held, Repaired, ReplicaMismatch
from lazarus.control.parts.agreement import Outvoted
from lazarus.control.ports import Publish
from lazarus.failure import Cause, Failure, Status

Expert = tuple[int, int]  # (layer, expert)

MOST_REPORTED = 16  # differences of one comparison that are published
STRIKES = 3  # steps after which a node must be outvoted to be suspect
APART_STEPS = 1000  # two suspects within so many steps point to user code


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The differences between ranks that are aligned at one step."""

    outvoted: Outvoted = field(default_factory=Outvoted)
    is_tied: bool = False  # the dense state differs, and nobody has a majority
    tied: tuple[Expert, ...] = ()  # experts without a majority


def compare(aligned: Mapping[str, Aligned], known: Outvoted) -> Comparison:
    """Vote on the dense state and on every expert that ranks hold.

    Args:
        aligned: Answers by worker, with digests and checksums.
        known: State that was outvoted earlier and is not repaired: it has no vote.
    """
    workers, is_tied = _dense_vote(aligned, known.workers)
    copies, tied = _expert_votes(aligned, known.copies)
    outvoted = Outvoted(workers=workers, copies=copies)
    return Comparison(outvoted=outvoted, is_tied=is_tied, tied=tied)


def _dense_key(body: Aligned) -> tuple[str, str, str]:
    return body.dense_digest, body.history_digest, body.settings_digest


def _dense_vote(
    aligned: Mapping[str, Aligned], known: frozenset[str]
) -> tuple[frozenset[str], bool]:
    """The workers whose dense state is outvoted, and whether there is no majority."""
    bodies = {id(body): body for body in aligned.values()}.values()  # each object once
    if len({_dense_key(body) for body in bodies}) < 2 and known.isdisjoint(aligned):
        return frozenset(), False
    votes = Counter(_dense_key(body) for worker, body in aligned.items() if worker not in known)
    if not votes:
        return frozenset(aligned), True
    usual, times = votes.most_common(1)[0]
    if 2 * times <= votes.total():
        return frozenset(), True
    return frozenset(w for w, body in aligned.items() if _dense_key(body) != usual), False


def _expert_votes(
    aligned: Mapping[str, Aligned], known: frozenset[tuple[str, int, int]]
) -> tuple[frozenset[tuple[str, int, int]], tuple[Expert, ...]]:
    """The outvoted copies (worker, layer, expert), and the experts without a majority."""
    bodies = {id(body): body for body in aligned.values()}.values()
    if not known and not any(held.sums for body in bodies for held in body.held):
        return frozenset(), ()
    outvoted: set[tuple[str, int, int]] = set()
    tied: list[Expert] = []
    for expert, sums in sorted(_sums(aligned).items()):
        usual = _usual({w: s for w, s in sums.items() if (w, *expert) not in known})
        if usual is None:
            tied.append(expert)
        outvoted |= {(worker, *expert) for worker, s in sums.items() if s != usual}
    return frozenset(outvoted), tuple(tied)


def _sums(aligned: Mapping[str, Aligned]) -> dict[Expert, dict[str, int]]:
    """Checksums of each expert's copies, by worker; 0 if none was computed."""
    found: dict[Expert, dict[str, int]] = {}
    for worker, body in aligned.items():
        for held in body.held:
            sums = held.sums or (0,) * len(held.experts)
            for expert, checksum in zip(held.experts, sums, strict=False):
                found.setdefault((held.layer, expert), {})[worker] = checksum
    return found


def _usual(sums: Mapping[str, int]) -> int | None:
    """The checksum of the majority of copies; None if there is no majority or no copy."""
    votes = Counter(sums.values())
    if not votes:
        return None
    usual, times = votes.most_common(1)[0]
    return usual if 2 * times > votes.total() else None


def without_outvoted(aligned: Mapping[str, Aligned], outvoted: Outvoted) -> dict[str, Aligned]:
    """The workers' answers without outvoted state.

    Outvoted workers get the majority's digests, history and scalars, and outvoted expert copies are
    removed from ``held``.
    """
    if not outvoted:
        return dict(aligned)
    sound = next(body for worker, body in aligned.items() if worker not in outvoted.workers)
    common = {
        name: getattr(sound, name)
        for name in ("dense_digest", "history_digest", "settings_digest", "history", "scalars")
    }
    bad: dict[str, set[Expert]] = {}
    for worker, layer, expert in outvoted.copies:
        bad.setdefault(worker, set()).add((layer, expert))
    offered = {}
    for worker, body in aligned.items():
        changes = dict(common) if worker in outvoted.workers else {}
        if worker in bad:
            changes["held"] = tuple(_without(held, bad[worker]) for held in body.held)
        offered[worker] = msgspec.structs.replace(body, **changes) if changes else body
    return offered


def _without(held: Held, bad: set[Expert]) -> Held:
    left = tuple(e for e in held.experts if (held.layer, e) not in bad)
    return Held(layer=held.layer, experts=left)


def judge(state: Control, transition: Transition, *, at_s: float) -> Decision:
    """Compare all aligned ranks, and plan the repair of what differs.

    The run ends instead if ``on_mismatch`` is "stop", or if there was no majority at the start or
    too often.
    """
    found = compare(transition.aligned, state.agreement.outvoted)
    if not (found.outvoted or found.is_tied):
        return replace(state, agreement=replace(state.agreement, outvoted=Outvoted())), ()
    events = _mismatches(state, transition, found, at_s=at_s)
    if state.config.on_mismatch == "stop":
        state, commands = stop(state, what=str(events[0].fields["what"]), at_s=at_s)
        return state, (*events, *commands)
    is_tied = found.is_tied or bool(found.tied)
    recent = [step for step in state.agreement.ties if transition.step - step <= APART_STEPS]
    if is_tied and (not state.resumed or len(recent) + 1 >= STRIKES):
        state, commands = _give_up_on_ties(state, at_s=at_s)
        return state, (*events, *commands)
    offered = {} if found.is_tied else without_outvoted(transition.aligned, found.outvoted)
    transition = replace(
        transition,
        aligned=offered or transition.aligned,
        outvoted=frozenset() if found.is_tied else found.outvoted.workers,
        goes_back=found.is_tied,
        is_tied=is_tied,
    )
    agreement = replace(state.agreement, outvoted=found.outvoted)
    return replace(state, transition=transition, agreement=agreement), events


def _mismatches(
    state: Control, transition: Transition, found: Comparison, *, at_s: float
) -> tuple[Publish, ...]:
    """Events for the differences that are not published yet."""
    fresh = found.outvoted.less(state.agreement.outvoted)
    places: list[tuple[Expert, list[str], bool]] = []
    if found.is_tied:
        places.append(((-1, -1), sorted(transition.aligned), False))
    elif fresh.workers:
        places.append(((-1, -1), sorted(fresh.workers), True))
    by_expert: dict[Expert, list[str]] = {}
    for worker, layer, expert in sorted(fresh.copies):
        by_expert.setdefault((layer, expert), []).append(worker)
    places += [(e, who, e not in found.tied) for e, who in sorted(by_expert.items())]
    return tuple(
        Publish(
            t=at_s,
            event="replica_mismatch",
            fields={
                "generation": transition.generation,
                "step": transition.step,
                "layer": layer,
                "expert": expert,
                "what": _sentence(state, (layer, expert), who, majority, step=transition.step),
                "ranks": [state.standing.seats.index(w) for w in who if w in state.standing.seats],
                "nodes": sorted({state.roster.workers[w].node for w in who}),
                "majority": majority,
            },
        )
        for (layer, expert), who, majority in places[:MOST_REPORTED]
    )


def place_name(layer: int, expert: int) -> str:
    """The name of an expert, or of the dense state (negative layer), for messages."""
    return "dense state" if layer < 0 else f"L{layer}/E{expert}"


def _sentence(
    state: Control, expert: Expert, workers: Iterable[str], majority: bool, *, step: int
) -> str:
    nodes = ", ".join(str(node) for node in sorted({state.roster.workers[w].node for w in workers}))
    verb = "differs on" if majority else "differs between"
    return f"{place_name(*expert)} {verb} node {nodes} after step {step}"


def stop(state: Control, *, what: str, at_s: float) -> Decision:
    """End the run at the first difference, as ``recovery.on_mismatch = "stop"`` demands."""
    resumable = bool(state.storage.checkpoints) or state.config.resume is not None
    failure = Failure(
        cause=Cause.NODE,
        error="StoppedError" if resumable else "LazarusError",
        message=f"replicas differ, and recovery.on_mismatch is stop: {what}",
        step=state.step,
        way_out="resume from a checkpoint of an earlier step"
        if resumable
        else "no checkpoint stands to resume from; start again",
    )
    status: Status = "short" if resumable else "failed"
    return commits.end(state, status=status, failure=failure, at_s=at_s)


def _give_up_on_ties(state: Control, *, at_s: float) -> Decision:
    message = (
        f"state or the optimizer's settings differ between ranks at step {state.step}, "
        "without a majority"
    )
    if state.resumed:
        message += f", {STRIKES} times in {APART_STEPS} steps: going back does not help"
    failure = Failure(
        cause=Cause.USER_CODE,
        error="LazarusError",
        message=message,
        step=state.step,
        way_out="the model, the optimizer and hooks must do the same on every rank",
    )
    return commits.end(state, status="failed", failure=failure, at_s=at_s)


def on_odd(state: Control, body: ReplicaMismatch, *, at_s: float) -> Decision:
    """Publish a difference that the comparison during training found.

    The ranks repair the difference themselves if there is a majority; otherwise a fence follows.
    """
    fields = {"generation": body.generation, "step": body.step, **json.loads(body.what)}
    event = Publish(t=at_s, event="replica_mismatch", fields=fields)
    if state.config.on_mismatch == "stop":
        state, commands = stop(state, what=str(fields.get("what", "")), at_s=at_s)
        return state, (event, *commands)
    if not fields.get("majority") and body.generation == state.resumed:
        state = replace(state, agreement=replace(state.agreement, undecided=True))
    return state, (event,)


def on_repaired(state: Control, worker: str, body: Repaired, *, at_s: float) -> Decision:
    """Publish a repair during training, and count a strike against the outvoted nodes."""
    if body.generation != state.resumed or worker not in state.standing.seats:
        return one_more_stale(state), ()
    ranks = [rank for rank in body.ranks if 0 <= rank < len(state.standing.seat_nodes)]
    nodes = [state.standing.seat_nodes[rank] for rank in ranks]
    state = with_strikes(state, nodes, step=body.step)
    place = (body.layer, body.expert)
    events = (
        _repaired(state, place, rank=rank, node=node, step=body.step, source="peer", at_s=at_s)
        for rank, node in zip(ranks, nodes, strict=True)
    )
    return state, tuple(events)


def with_strikes(state: Control, nodes: Iterable[int], *, step: int) -> Control:
    """Note that these nodes were outvoted after ``step``; each step counts once."""
    known = dict(state.agreement.outvotes)
    for node in set(nodes):
        if step not in known.get(node, ()):
            known[node] = (*known.get(node, ()), step)
    return replace(state, agreement=replace(state.agreement, outvotes=known))


def at_resume(
    state: Control, transition: Transition, *, at_s: float
) -> tuple[Control, tuple[Publish, ...]]:
    """Publish the repairs that a RESUME completes, and count strikes against outvoted nodes."""
    if transition.is_tied:  # once for all attempts at this RESUME
        ties = (*state.agreement.ties, transition.step)[-STRIKES:]
        state = replace(state, agreement=replace(state.agreement, ties=ties))
    bad = state.agreement.outvoted
    step, seats = transition.step, [seat.worker for seat in transition.seats]
    source = "checkpoint" if transition.goes_back else "peer"
    places: list[tuple[Expert, str, str]] = [((-1, -1), w, source) for w in sorted(bad.workers)]
    if transition.goes_back:
        places = [((-1, -1), w, source) for w in seats]
    restored = {(restore.layer, restore.expert) for restore in transition.restores}
    for worker, layer, expert in sorted(bad.copies):
        known = "checkpoint" if (layer, expert) in restored else "peer"
        places.append(((layer, expert), worker, known))
    outvoted = [w for _, w, known in places if known == "peer"]
    blamed = [state.roster.workers[w].node for w in outvoted if w in state.roster.workers]
    state = with_strikes(state, blamed, step=step)
    events = tuple(
        _repaired(
            state,
            place,
            rank=seats.index(worker),
            node=state.roster.workers[worker].node,
            step=step,
            source=known,
            at_s=at_s,
        )
        for place, worker, known in places[:MOST_REPORTED]
        if worker in seats and _is_planned(transition, place, seats.index(worker))
    )
    return replace(state, agreement=replace(state.agreement, outvoted=Outvoted())), events


def _is_planned(transition: Transition, place: Expert, rank: int) -> bool:
    """Whether the rank has this expert (or the dense state) under the new plan."""
    layer, expert = place
    plan = transition.plan
    return layer < 0 or (plan is not None and expert in plan.expert_of_slot[layer, rank])


def _repaired(
    state: Control, place: Expert, *, rank: int, node: int, step: int, source: str, at_s: float
) -> Publish:
    layer, expert = place
    fields = {
        "generation": state.generation,
        "step": step,
        "what": place_name(layer, expert),
        "layer": layer,
        "expert": expert,
        "rank": rank,
        "node": node,
        "source": source,
    }
    return Publish(t=at_s, event="replica_repaired", fields=fields)


def suspect(state: Control) -> int | None:
    """The first member that was outvoted after ``STRIKES`` or more steps; None if there is none."""
    if state.phase is not Phase.RUNNING or len(state.standing.members) < 2:
        return None
    known = state.agreement.outvotes
    often = (n for n in state.standing.members if len(known.get(n, ())) >= STRIKES)
    return next(often, None)


def on_suspect(state: Control, node: int, *, at_s: float) -> tuple[Control, Publish | None]:
    """Publish that a node is suspect; the caller evicts the node.

    Returns:
        The next state and the event. The event is None if another node was suspect within the last
        ``APART_STEPS`` steps; the caller then ends the run with ``end_by_user_code``.
    """
    steps = state.agreement.outvotes[node]
    fields = {
        "generation": state.resumed,
        "node": node,
        "times": len(steps),
        "steps": list(steps),
        "reason": f"outvoted by the other ranks after steps {', '.join(map(str, steps))}",
    }
    event = Publish(t=at_s, event="node_suspect", fields=fields)
    before = [step for _, step in state.agreement.suspects if steps[-1] - step <= APART_STEPS]
    if before:
        return state, None
    suspects = (*state.agreement.suspects, (node, steps[-1]))
    state = replace(state, agreement=replace(state.agreement, suspects=suspects))
    return state, event


def end_by_user_code(state: Control, node: int, *, at_s: float) -> Decision:
    """End the run because a second node is outvoted too often, which points to user code."""
    first = state.agreement.suspects[-1][0]
    failure = Failure(
        cause=Cause.USER_CODE,
        error="LazarusError",
        message=(
            f"ranks part ways again and again: node {first} was outvoted until it was evicted, "
            f"and now node {node} is"
        ),
        node=node,
        step=state.step,
        way_out="the model, the optimizer and hooks must do the same on every rank",
    )
    return commits.end(state, status="failed", failure=failure, at_s=at_s)

"""Rebuilds the controller's state from its journal after a restart (rules 35-39)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.checkpoint.selection.adaptive import Adapted
from lazarus.control.cluster import evidence
from lazarus.control.cluster.state import Control, ControlConfig, Phase
from lazarus.control.commit.commits import commit_events, counts_of
from lazarus.control.messages import Vector
from lazarus.control.parts.roster import Node
from lazarus.control.parts.saving import Saving
from lazarus.control.parts.standing import Standing
from lazarus.control.parts.storage import Storage
from lazarus.control.ports import Publish, Stored
from lazarus.control.saving.saves import seats_remembered
from lazarus.control.vector import advance_history, start_history
from placement import Plan


def initial_state(config: ControlConfig, *, term: int, now_s: float) -> Control:
    """The state at the start of a run, or of a run that starts from a checkpoint."""
    return Control(
        config=config,
        term=term,
        started_s=now_s,
        phase_s=now_s,
        step=config.start_step,
        generation=config.start_generation,
        standing=Standing(lineage=config.start_lineage),
        storage=Storage(checkpoints=config.checkpoints, stored=config.stored),
        saving=Saving(plt=config.start_plt, plt_spent=config.start_plt_spent),
    )


def blank_state(config: ControlConfig) -> Control:
    """The state before the first journal entry, with term 0 and time 0."""
    return initial_state(config, term=0, now_s=0.0)


def awakened(state: Control, *, now_s: float) -> Control:
    """The state of a restarted controller, from its replayed journal.

    The workers of the newest RESUMEd generation are expected to come back; see
    ``members.settle_reconnecting`` for how long. Generations claimed but never resumed are void.

    Args:
        state: The state after the last journal entry.
        now_s: Current time in seconds.
    """
    state = replace(state, term=state.term + 1, started_s=now_s, phase_s=now_s)
    if not state.resumed:
        return replace(
            state, roster=replace(state.roster, nodes={}, next_serial=state.roster.next_serial)
        )
    wanted = set(state.standing.members)
    return replace(
        state,
        phase=Phase.RECONNECTING,
        roster=replace(
            state.roster, nodes={n: node for n, node in state.roster.nodes.items() if n in wanted}
        ),
    )


def missing_commits(
    entries: Iterable[Mapping[str, Any]], state: Control, *, said: Callable[[str, int, int], bool]
) -> Iterator[Publish]:
    """Events of journaled commits and rollbacks that the record lacks.

    Args:
        entries: The journal entries after ``state``.
        state: The replayed state before these entries.
        said: Whether the record has an event, given its name, generation and step.
    """
    names = ("step_committed", "ledger") if state.config.ledger else ("step_committed",)
    found: list[Publish] = []
    for entry in entries:
        for commit in entry.get("commits", ()):
            generation, step = int(commit["generation"]), int(commit["step"])
            missing = [name for name in names if not said(name, generation, step)]
            if missing == ["ledger"] and said("ledger_mismatch", generation, step):
                missing = []
            if missing:
                events = commit_events(state, vector_of(commit))
                found += (e for e in events if e.event != "step_committed" or e.event in missing)
        if entry["kind"] == "resume" and entry["rollback"]:
            found = []  # events of void commits are not published
            fields = {"generation": int(entry["generation"]), "step": int(entry["step"])}
            if not said("rolled_back", fields["generation"], fields["step"]):
                at_s = 0.0 if state.committed.newest is None else state.committed.newest.at_s
                found.append(Publish(t=at_s, event="rolled_back", fields=fields))
        state = replayed(state, entry)
    return iter(found)


def vector_of(commit: Mapping[str, Any]) -> Vector:
    """The commit vector in a journaled commit."""
    return Vector(
        generation=int(commit["generation"]),
        step=int(commit["step"]),
        lanes=base64.b64decode(commit["lanes"]),
        wall_s=float(commit["wall_s"]),
        at_s=float(commit["at_s"]),
    )


def replayed(state: Control, entry: Mapping[str, Any]) -> Control:
    """The replayed state after one more journal entry."""
    if (found := entry if entry["kind"] == evidence.KIND else entry.get(evidence.KIND)) is not None:
        state = evidence.recalled(state, found)
    match entry["kind"]:
        case "term":
            return replace(state, term=max(state.term, int(entry["term"])))
        case "serial":
            serial = int(entry["node"])
            empty = Node(key=str(entry["key"]), workers=("",) * state.config.ranks_per_node)
            return replace(
                state,
                roster=replace(
                    state.roster,
                    next_serial=max(state.roster.next_serial, serial + 1),
                    nodes={**state.roster.nodes, serial: empty},
                ),
            )
        case "claim":
            voters = set(entry["members"])  # members without a vote are lost (rule 38)
            members = tuple(n for n in state.standing.members if n in voters)
            return replace(
                state,
                generation=int(entry["generation"]),
                standing=replace(state.standing, members=members),
            )
        case "commits":
            return _committed(state, entry)
        case "resume":
            return _resumed(state, entry)
        case "fault":
            key = (str(entry["worker"]), int(entry["number"]))
            specs = state.injected.fired_specs | (
                {str(entry["spec"])} if "spec" in entry else set()
            )
            return replace(
                state,
                injected=replace(
                    state.injected, struck=state.injected.struck | {key}, fired_specs=specs
                ),
            )
        case "evaluated":
            return replace(state, committed=replace(state.committed, evaluated=int(entry["step"])))
        case "manifest":
            return _stored(state, entry)
    return state


def _committed(state: Control, entry: Mapping[str, Any]) -> Control:
    """The state after an entry of committed steps, which has their vectors."""
    vectors = [vector_of(commit) for commit in entry["commits"]]
    history, last = state.committed.history, vectors[-1]
    for vector in vectors:
        lanes = np.frombuffer(vector.lanes, dtype="<f8")
        history = advance_history(history, counts_of(state, lanes))
    standing = state.standing
    base = standing.plan if last.generation == state.resumed else standing.base_plan
    return replace(
        state,
        step=last.step,
        standing=replace(standing, base_plan=base),
        committed=replace(state.committed, history=history, newest=last),
    )


def _stored(state: Control, entry: Mapping[str, Any]) -> Control:
    """The state after an entry of a written manifest, which lists what storage holds."""
    stored = tuple(
        Stored(layer=x, expert=e, generation=g, step=t, routed=r)
        for x, e, g, t, r in entry["stored"]
    )
    standing = tuple(
        StoredCheckpoint(generation=g, step=t, is_full=full) for g, t, full in entry["standing"]
    )
    return replace(
        state,
        storage=replace(state.storage, checkpoints=standing, stored=stored),
        saving=replace(state.saving, ordered=int(entry["step"])),
    )


def _ledger(state: Control, entry: Mapping[str, Any]) -> PltLedger:
    """The ledger of lost tokens after a RESUME entry; ``state`` has the entry's load history."""
    ledger = state.saving.plt
    if entry["rollback"]:
        ledger = ledger.rolled_back(state.committed.routed.tolist())
    for restore in entry["restores"]:
        if restore["detail"]:
            layer, expert = int(restore["layer"]), int(restore["expert"])
            routed = int(state.committed.routed[layer, expert])
            ledger, _ = ledger.restored(
                layer=layer,
                expert=expert,
                version_routed=min(int(restore["detail"].split(",")[2]), routed),
                routed=routed,
            )
    return ledger


def _adapted(figures: Sequence[int]) -> Adapted | None:
    return (
        None
        if not figures
        else Adapted(k_snapshot=figures[0], snapshot_every=figures[1], persist_every=figures[2])
    )


def _resumed(state: Control, entry: Mapping[str, Any]) -> Control:
    plan = Plan.from_dict(entry["plan"])
    layers, experts = int(entry["shape"][0]), int(entry["shape"][1])
    history = state.committed.history
    if history.shape != (3, layers, experts):
        history = start_history(layers, experts)
    if entry["rollback"]:
        history = np.frombuffer(base64.b64decode(entry["history"]), dtype="<f8")
        history = history.reshape((3, layers, experts))
    generation, step = int(entry["generation"]), int(entry["step"])
    return replace(
        state,
        generation=generation,
        standing=replace(
            state.standing,
            past_seats=seats_remembered(state) if state.resumed else {},
            top_k=int(entry["top_k"]),
            num_samples=int(entry.get("num_samples", 0)),
            members=tuple(int(n) for n in entry["nodes"]),
            seats=tuple(str(w) for w in entry["seats"]),
            seat_nodes=tuple(int(n) for n in entry["seat_nodes"]),
            rolled=(generation, step) if entry["rollback"] else state.standing.rolled,
            plan=plan,
            base_plan=plan if state.standing.base_plan is None else state.standing.base_plan,
            lineage=(*state.standing.lineage, (generation, step)),
            shape=(layers, experts),
            record_bytes=(int(entry["record_bytes"][0]), int(entry["record_bytes"][1])),
        ),
        saving=replace(
            state.saving,
            ordered=min(state.saving.ordered, step),
            adapted=_adapted(entry["adapted"]),
            doubling=bool(entry.get("double_k", False)),
            plt=_ledger(replace(state, committed=replace(state.committed, history=history)), entry),
        ),
        resumed=generation,
        step=step if entry["rollback"] else max(state.step, step),
        committed=replace(
            state.committed,
            newest=None if entry["rollback"] else state.committed.newest,
            history=history,
        ),
        tuning=replace(
            state.tuning,
            speeds={int(n): float(w) for n, w in entry["speeds"]},
            next_speeds={int(n): float(w) for n, w in entry["speeds"]},
        ),
    )

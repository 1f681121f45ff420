"""Checkpoints as the controller sees them: shares come in, manifests are ordered.

A checkpoint of generation g and step t is true once every seat of g has reported its share and t
is published, whichever generation runs by then: a loss or a join does not void what the survivors
still write (rule 29). It is lost with the first seat that is gone without having reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lazarus.checkpoint.format.lineage import Lineage, is_valid
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.control.cluster.state import Control, Decision, Phase, Save, Transition
from lazarus.control.messages import ShareReported
from lazarus.control.ports import Command, DropFiles, Journal, ManifestDone, Publish, WriteManifest
from lazarus.control.saving.adapting import on_measured

_DOUBLINGS = 8  # of the time between pauses for a full checkpoint
_GENERATIONS = 8  # whose seats are remembered: a share that comes later than that is dropped


def on_snapshotted(state: Control, worker: str, body: ShareReported, *, at_s: float) -> Decision:
    """A keeper finished something; with the last share of a checkpoint comes its manifest."""
    record = json.loads(body.record)
    persists = record["kind"] == "persist" or bool(record.get("persist"))
    commands: tuple[Command, ...] = ()
    if record["kind"] == "copy":
        return state, ()
    if not record["ok"]:
        node = state.workers[worker].node
        fields = {"step": body.step, "reason": str(record.get("error", "")), "node": node}
        commands = (_failed(body.generation, fields, at_s=at_s),)
    save = _save_of(state, body)
    if not persists or save is None:
        return state, commands
    if not record["ok"]:
        commands = (*commands, *dropped(save.shares))
        save = replace(save, shares=dict.fromkeys((*save.shares, worker), ""), failed=True)
        state = replace(state, saves={**state.saves, body.step: save})
        return _want_all(state, at_s=at_s), commands
    if save.failed:  # the others' shares are of no use any more
        save = replace(save, shares={**save.shares, worker: ""})
        state = replace(state, saves={**state.saves, body.step: save})
        return state, (*commands, *dropped({worker: body.record}))
    state = on_measured(state, worker, record)
    save = replace(save, shares={**save.shares, worker: body.record})
    state = replace(state, saves={**state.saves, body.step: save})
    state, more = order_manifests(state, at_s=at_s)
    return state, commands + more


def dropped(shares: Mapping[str, str]) -> tuple[DropFiles, ...]:
    """The files of shares of a checkpoint that will not become true."""
    reports = [json.loads(share) for share in shares.values() if share]
    paths = tuple(str(item["path"]) for r in reports for item in r.get("files", ()))
    return (DropFiles(paths=paths),) if paths else ()


def _failed(generation: int, fields: dict[str, Any], *, at_s: float) -> Publish:
    fields = {"generation": generation, **fields}
    return Publish(t=at_s, event="checkpoint_failed", fields=fields)


def _save_of(state: Control, body: ShareReported) -> Save | None:
    """The checkpoint that a share belongs to; None if it can not become true any more."""
    generation, step = body.generation, body.step
    seats = state.seats if generation == state.resumed else state.past_seats.get(generation)
    on_history = is_valid(
        generation=generation, step=step, lineage=state.lineage, resume_step=max(step, state.step)
    )
    if seats is None or not on_history or step <= state.ordered:
        return None
    save = state.saves.get(step)
    if save is None or save.generation < generation:
        return Save(generation=generation, seats=seats)
    return save if save.generation == generation else None


def order_manifests(state: Control, *, at_s: float) -> Decision:
    """Every step whose shares are all in and whose commit is published (rule 28)."""
    commands: list[Command] = []
    for step, save in sorted(state.saves.items()):
        if step > state.step:
            continue
        answered = set(save.shares) >= set(save.seats)
        whole = answered and not save.failed
        if whole and step > state.ordered:
            commands.append(_order(state, step, save))
            state = replace(state, ordered=step, writing=(*state.writing, step))
        elif not answered and not is_hopeless(state, save):
            continue
        elif not save.failed and not whole:
            gone = [w for w in save.seats if w not in save.shares and w not in state.workers]
            reason = f"{len(gone)} of {len(save.seats)} ranks were lost before they had written"
            commands.append(_failed(save.generation, {"step": step, "reason": reason}, at_s=at_s))
            commands.extend(dropped(save.shares))
            state = _want_all(state, at_s=at_s)
        state = replace(state, saves={s: v for s, v in state.saves.items() if s != step})
    return state, tuple(commands)


def _order(state: Control, step: int, save: Save) -> WriteManifest:
    parts = tuple(save.shares[seat] for seat in save.seats)
    meta = meta_of(state, wall_s=0.0)
    return WriteManifest(step=step, generation=save.generation, parts=parts, meta=meta)


def meta_of(state: Control, *, wall_s: float) -> dict[str, Any]:
    """What a manifest says of the run: its lost tokens go with the state that lacks them."""
    return {
        "term": state.term,
        "lineage": [list(pair) for pair in state.lineage],
        "wall_s": wall_s,
        "plt": {"lost": state.plt.to_json(), "spent": state.plt_spent},
    }


def is_hopeless(state: Control, save: Save) -> bool:
    """Whether a share is missing whose rank will never send it."""
    if state.phase is Phase.RECONNECTING:
        return False  # who is missing may be on the way back
    return any(w not in save.shares and w not in state.workers for w in save.seats)


def in_flight(state: Control, *, upto: int) -> int:
    """Newest step <= ``upto`` whose checkpoint may still become true; -1: none."""
    hoped = [
        step
        for step, save in state.saves.items()
        if step > state.ordered and not save.failed and not is_hopeless(state, save)
    ]
    return max((step for step in (*hoped, *state.writing) if step <= upto), default=-1)


def after_resume(state: Control, lineage: Lineage) -> Mapping[int, Save]:
    """What of the shares on their way survives a RESUME."""
    return {
        step: save
        for step, save in state.saves.items()
        if is_valid(generation=save.generation, step=step, lineage=lineage, resume_step=step)
    }


def seats_remembered(state: Control) -> Mapping[int, tuple[str, ...]]:
    """Seats of the generation that ends now and of a few before it."""
    known = {**state.past_seats, state.resumed: state.seats}
    return {generation: known[generation] for generation in sorted(known)[-_GENERATIONS:]}


def _uprooted(state: Control) -> Decision:
    """Somebody removed or damaged files: no checkpoint at this run's own place stands any more."""
    standing = tuple(c for c in state.checkpoints if c.step < _first_own(state))
    if standing == state.checkpoints:
        return state, ()
    state = replace(state, checkpoints=standing)
    return state, (Journal(entry=_standing_entry(state, step=state.ordered)),)


def _standing_entry(state: Control, *, step: int) -> dict[str, Any]:
    """Which checkpoints stand once the manifest of ``step`` was ordered, for the journal."""
    return {
        "kind": "manifest",
        "term": state.term,
        "step": step,
        "standing": [[c.generation, c.step, c.is_full] for c in state.checkpoints],
        "stored": [[s.layer, s.expert, s.generation, s.step, s.routed] for s in state.stored],
    }


def _first_own(state: Control) -> int:
    """Older checkpoints lie where the run began, from which no file is taken over."""
    config = state.config
    return 0 if config.resume in (None, config.checkpoint_url) else config.start_step + 1


def none_stands(state: Control) -> bool:
    """Whether no checkpoint of this run's history stands that a partial one could point to."""
    first = _first_own(state)
    return not any(
        c.step >= first
        and is_valid(
            generation=c.generation, step=c.step, lineage=state.lineage, resume_step=c.step
        )
        for c in state.checkpoints
    )


def _want_all(state: Control, *, at_s: float) -> Control:
    """The checkpoint that all partial ones would have pointed to is lost: ask for another.

    That costs a pause. While checkpoints fail again and again, each pause comes later.
    """
    needed = none_stands(state) and state.config.partial_checkpoints
    if not needed or state.wants or at_s < state.whole_again_s:
        return state
    pause_s = state.config.timeouts.whole_pause_s * 2 ** min(state.whole_asked, _DOUBLINGS)
    return replace(
        state,
        wants="checkpoint",
        whole_asked=state.whole_asked + 1,
        whole_again_s=at_s + pause_s,
    )


def worth_waiting(state: Control, transition: Transition, *, at_s: float) -> bool:
    """Whether a checkpoint newer than all that stand is in flight, and may still come in time."""
    usable = max((c.step for c in state.checkpoints if c.step <= transition.step), default=-1)
    waited = at_s - transition.phase_s
    newest = in_flight(state, upto=transition.step)
    return waited <= state.config.timeouts.in_flight_s and newest > usable


def last_ones_awaited(state: Control, *, at_s: float) -> bool:
    """Whether the end of the run waits for a checkpoint on its way: no full one follows it."""
    waited = at_s - state.phase_s
    return (
        not state.config.final_checkpoint
        and waited <= state.config.timeouts.in_flight_s
        and in_flight(state, upto=state.step) >= 0
    )


def on_manifest(state: Control, event: ManifestDone) -> Decision:
    """A checkpoint became true, or did not."""
    if event.final:
        state = replace(state, manifest_pending=False)
    else:
        state = replace(state, writing=tuple(s for s in state.writing if s != event.step))
    if event.error:
        fields = {"step": event.step, "reason": event.error}
        failed = _failed(event.generation, fields, at_s=event.at_s)
        state, noted = _uprooted(state) if event.is_rootless else (state, ())
        return _want_all(state, at_s=event.at_s), (*noted, failed)
    standing = tuple(
        StoredCheckpoint(generation=g, step=t, is_full=full) for g, t, full in event.standing
    )
    state = replace(
        state, checkpoints=standing, stored=event.stored, whole_asked=0, whole_again_s=0.0
    )
    entry = {
        **_standing_entry(state, step=event.step),
        "generation": event.generation,
        "full": event.kind == "full",
    }
    done = {
        "generation": event.generation,
        "step": event.step,
        "bytes": event.num_bytes,
        "wall_s": event.wall_s,
        "kind": event.kind,
    }
    return state, (
        Journal(entry=entry),
        Publish(t=event.at_s, event="checkpoint_persisted", fields=done),
    )

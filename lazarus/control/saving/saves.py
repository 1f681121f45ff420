"""Collects the shares of checkpoints and orders their manifests.

The manifest of a checkpoint of generation g and step t is ordered once every worker of g has
reported its share and t is published, whichever generation runs by then: a loss or a join does not
void what the other ranks still write (rule 29). The checkpoint fails if a worker of g is lost
before it has reported its share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lazarus.checkpoint.format.lineage import Lineage, is_valid
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.control.cluster.state import Control, Decision, Phase
from lazarus.control.cluster.transition import Transition
from lazarus.control.messages import ShareReported
from lazarus.control.parts.saving import Save
from lazarus.control.ports import Command, DropFiles, Journal, ManifestDone, Publish, WriteManifest
from lazarus.control.saving.adapting import on_measured

_DOUBLINGS = 8  # most doublings of the time between pauses for a full checkpoint
_GENERATIONS = 8  # generations whose late shares are accepted


def on_snapshotted(state: Control, worker: str, body: ShareReported, *, at_s: float) -> Decision:
    """Handle the end of a snapshot or persist on a node.

    The last share of a checkpoint leads to its manifest; a failed share makes the checkpoint fail.
    """
    record = json.loads(body.record)
    persists = record["kind"] == "persist" or bool(record.get("persist"))
    commands: tuple[Command, ...] = ()
    if record["kind"] == "copy":
        return state, ()
    if not record["ok"]:
        node = state.roster.workers[worker].node
        fields = {"step": body.step, "reason": str(record.get("error", "")), "node": node}
        commands = (_failed(body.generation, fields, at_s=at_s),)
    save = _save_of(state, body)
    if not persists or save is None:
        return state, commands
    if not record["ok"]:
        commands = (*commands, *dropped(save.shares))
        save = replace(save, shares=dict.fromkeys((*save.shares, worker), ""), failed=True)
        state = replace(
            state, saving=replace(state.saving, saves={**state.saving.saves, body.step: save})
        )
        return _want_all(state, at_s=at_s), commands
    if save.failed:  # this share is of no use any more
        save = replace(save, shares={**save.shares, worker: ""})
        state = replace(
            state, saving=replace(state.saving, saves={**state.saving.saves, body.step: save})
        )
        return state, (*commands, *dropped({worker: body.record}))
    state = on_measured(state, worker, record)
    save = replace(save, shares={**save.shares, worker: body.record})
    state = replace(
        state, saving=replace(state.saving, saves={**state.saving.saves, body.step: save})
    )
    state, more = order_manifests(state, at_s=at_s)
    return state, commands + more


def dropped(shares: Mapping[str, str]) -> tuple[DropFiles, ...]:
    """A command that deletes the files of these shares; none if there are no files."""
    reports = [json.loads(share) for share in shares.values() if share]
    paths = tuple(str(item["path"]) for r in reports for item in r.get("files", ()))
    return (DropFiles(paths=paths),) if paths else ()


def _failed(generation: int, fields: dict[str, Any], *, at_s: float) -> Publish:
    fields = {"generation": generation, **fields}
    return Publish(t=at_s, event="checkpoint_failed", fields=fields)


def _save_of(state: Control, body: ShareReported) -> Save | None:
    """The checkpoint that a share belongs to; None if it can no longer be completed."""
    generation, step = body.generation, body.step
    seats = (
        state.standing.seats
        if generation == state.resumed
        else state.standing.past_seats.get(generation)
    )
    on_history = is_valid(
        generation=generation,
        step=step,
        lineage=state.standing.lineage,
        resume_step=max(step, state.step),
    )
    if seats is None or not on_history or step <= state.saving.ordered:
        return None
    save = state.saving.saves.get(step)
    if save is None or save.generation < generation:
        return Save(generation=generation, seats=seats)
    return save if save.generation == generation else None


def order_manifests(state: Control, *, at_s: float) -> Decision:
    """Order the manifests of published steps whose shares are complete (rule 28).

    Checkpoints that cannot be completed are published as failed and their files deleted.
    """
    commands: list[Command] = []
    for step, save in sorted(state.saving.saves.items()):
        if step > state.step:
            continue
        answered = set(save.shares) >= set(save.seats)
        whole = answered and not save.failed
        if whole and step > state.saving.ordered:
            commands.append(_order(state, step, save))
            state = replace(
                state,
                saving=replace(state.saving, ordered=step, writing=(*state.saving.writing, step)),
            )
        elif not answered and not is_hopeless(state, save):
            continue
        elif not save.failed and not whole:
            gone = [w for w in save.seats if w not in save.shares and w not in state.roster.workers]
            reason = f"{len(gone)} of {len(save.seats)} ranks were lost before they had written"
            commands.append(_failed(save.generation, {"step": step, "reason": reason}, at_s=at_s))
            commands.extend(dropped(save.shares))
            state = _want_all(state, at_s=at_s)
        state = replace(
            state,
            saving=replace(
                state.saving, saves={s: v for s, v in state.saving.saves.items() if s != step}
            ),
        )
    return state, tuple(commands)


def _order(state: Control, step: int, save: Save) -> WriteManifest:
    parts = tuple(save.shares[seat] for seat in save.seats)
    meta = meta_of(state, wall_s=0.0)
    return WriteManifest(step=step, generation=save.generation, parts=parts, meta=meta)


def meta_of(state: Control, *, wall_s: float) -> dict[str, Any]:
    """The run's data in a manifest: term, lineage, time, and the lost tokens up to this state."""
    return {
        "term": state.term,
        "lineage": [list(pair) for pair in state.standing.lineage],
        "wall_s": wall_s,
        "plt": {"lost": state.saving.plt.to_json(), "spent": state.saving.plt_spent},
    }


def is_hopeless(state: Control, save: Save) -> bool:
    """Whether a missing share will never come, because its worker is lost."""
    if state.phase is Phase.RECONNECTING:
        return False  # missing workers may come back
    return any(w not in save.shares and w not in state.roster.workers for w in save.seats)


def in_flight(state: Control, *, upto: int) -> int:
    """Newest step <= ``upto`` whose checkpoint may still be completed; -1 if there is none."""
    hoped = [
        step
        for step, save in state.saving.saves.items()
        if step > state.saving.ordered and not save.failed and not is_hopeless(state, save)
    ]
    return max((step for step in (*hoped, *state.saving.writing) if step <= upto), default=-1)


def after_resume(state: Control, lineage: Lineage) -> Mapping[int, Save]:
    """The incomplete checkpoints, by step, that are still valid after a RESUME."""
    return {
        step: save
        for step, save in state.saving.saves.items()
        if is_valid(generation=save.generation, step=step, lineage=lineage, resume_step=step)
    }


def seats_remembered(state: Control) -> Mapping[int, tuple[str, ...]]:
    """Seats of the generation that ends now and of a few before it, by generation."""
    known = {**state.standing.past_seats, state.resumed: state.standing.seats}
    return {generation: known[generation] for generation in sorted(known)[-_GENERATIONS:]}


def _uprooted(state: Control) -> Decision:
    """Forget all checkpoints at the run's own place, whose files were removed or damaged."""
    standing = tuple(c for c in state.storage.checkpoints if c.step < _first_own(state))
    if standing == state.storage.checkpoints:
        return state, ()
    state = replace(state, storage=replace(state.storage, checkpoints=standing))
    return state, (Journal(entry=_standing_entry(state, step=state.saving.ordered)),)


def _standing_entry(state: Control, *, step: int) -> dict[str, Any]:
    """The journal entry with the checkpoints that exist after the manifest of ``step``."""
    return {
        "kind": "manifest",
        "term": state.term,
        "step": step,
        "standing": [[c.generation, c.step, c.is_full] for c in state.storage.checkpoints],
        "stored": [
            [s.layer, s.expert, s.generation, s.step, s.routed] for s in state.storage.stored
        ],
    }


def _first_own(state: Control) -> int:
    """The first step whose checkpoint can be at the run's own place.

    Older ones are at the place that the run was started from; new ones cannot use their files.
    """
    config = state.config
    return 0 if config.resume in (None, config.checkpoint_url) else config.start_step + 1


def none_stands(state: Control) -> bool:
    """Whether there is no valid checkpoint that a partial checkpoint could point to."""
    first = _first_own(state)
    return not any(
        c.step >= first
        and is_valid(
            generation=c.generation, step=c.step, lineage=state.standing.lineage, resume_step=c.step
        )
        for c in state.storage.checkpoints
    )


def _want_all(state: Control, *, at_s: float) -> Control:
    """Ask for a pause to save a full checkpoint, if partial ones have nothing to point to.

    While checkpoints keep failing, the time to the next such pause doubles.
    """
    needed = none_stands(state) and state.config.partial_checkpoints
    if not needed or state.pausing.wants or at_s < state.pausing.whole_again_s:
        return state
    pause_s = state.config.timeouts.whole_pause_s * 2 ** min(state.pausing.whole_asked, _DOUBLINGS)
    return replace(
        state,
        pausing=replace(
            state.pausing,
            wants="checkpoint",
            whole_asked=state.pausing.whole_asked + 1,
            whole_again_s=at_s + pause_s,
        ),
    )


def worth_waiting(state: Control, transition: Transition, *, at_s: float) -> bool:
    """Whether a checkpoint newer than all usable ones may still be completed within the limit."""
    usable = max(
        (c.step for c in state.storage.checkpoints if c.step <= transition.step), default=-1
    )
    waited = at_s - transition.phase_s
    newest = in_flight(state, upto=transition.step)
    return waited <= state.config.timeouts.in_flight_s and newest > usable


def last_ones_awaited(state: Control, *, at_s: float) -> bool:
    """Whether the end of a run without a final checkpoint waits for a checkpoint in flight."""
    waited = at_s - state.phase_s
    return (
        not state.config.final_checkpoint
        and waited <= state.config.timeouts.in_flight_s
        and in_flight(state, upto=state.step) >= 0
    )


def on_manifest(state: Control, event: ManifestDone) -> Decision:
    """Handle a manifest that was written, or could not be."""
    if event.final:
        state = replace(state, ending=replace(state.ending, manifest_pending=False))
    else:
        state = replace(
            state,
            saving=replace(
                state.saving, writing=tuple(s for s in state.saving.writing if s != event.step)
            ),
        )
    if event.error:
        fields = {"step": event.step, "reason": event.error}
        failed = _failed(event.generation, fields, at_s=event.at_s)
        state, noted = _uprooted(state) if event.is_rootless else (state, ())
        return _want_all(state, at_s=event.at_s), (*noted, failed)
    standing = tuple(
        StoredCheckpoint(generation=g, step=t, is_full=full) for g, t, full in event.standing
    )
    state = replace(
        state,
        storage=replace(state.storage, checkpoints=standing, stored=event.stored),
        pausing=replace(state.pausing, whole_asked=0, whole_again_s=0.0),
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

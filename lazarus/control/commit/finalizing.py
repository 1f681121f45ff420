"""The end of a run: the last digest and the last checkpoint. PURE.

Ranks keep their state until the last checkpoint is complete. If the checkpoint place fails, the
checkpoint is written to the run's ``rescue`` folder instead. If this fails too, the run ends with
an error that names the place, the storage's message and the size of the checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from lazarus.basics.format import bytes_text
from lazarus.checkpoint.format.lineage import is_valid
from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.commit import commits
from lazarus.control.messages import Finalize, Finalized, StorageProblem
from lazarus.control.ports import Command, DropFiles, ManifestDone, Publish, TellAll, WriteManifest
from lazarus.control.saving import saves
from lazarus.failure import Cause, Failure, Status


def begin(state: Control, *, at_s: float) -> Decision:
    """Order the last digest and a full checkpoint, once all ranks have paused at the last step."""
    order = Finalize(
        generation=state.resumed,
        step=state.step,
        checkpoint=state.config.final_checkpoint,
        term=state.term,
    )
    state = replace(
        state,
        phase=Phase.FINALIZING,
        phase_s=at_s,
        ending=replace(state.ending, finalized={}, digest="", final_url="", final_problem=None),
    )
    return state, (TellAll(workers=state.standing.seats, body=order),)


def on_finalized(state: Control, worker: str, body: Finalized, *, at_s: float) -> Decision:
    """Store one rank's share of the last checkpoint; the last share leads to the manifest."""
    wanted = (state.resumed, state.ending.final_url)
    if state.phase is not Phase.FINALIZING or (body.generation, body.url) != wanted:
        return one_more_stale(state), ()
    finalized = {**state.ending.finalized, worker: body}
    state = replace(state, ending=replace(state.ending, finalized=finalized))
    if not set(state.ending.finalized) >= set(state.standing.seats):
        return state, ()
    bodies = [state.ending.finalized[seat] for seat in state.standing.seats]
    size = sum(body.num_bytes for body in bodies)
    state = replace(state, ending=replace(state.ending, final_bytes=size))
    problem = next((body.problem for body in bodies if body.problem is not None), None)
    if problem is not None:
        return _refused(state, problem, at_s=at_s)
    parts = tuple(body.files for body in bodies)
    if not any(parts):
        return state, ()
    order = WriteManifest(
        step=body.step,
        generation=state.resumed,
        parts=parts,
        meta=saves.meta_of(state, wall_s=max(body.wall_s for body in bodies)),
        final=True,
        url=state.ending.final_url,
    )
    # No older manifest may follow: it would point to versions newer than itself.
    return replace(
        state,
        ending=replace(state.ending, manifest_pending=True),
        saving=replace(state.saving, ordered=body.step),
    ), (order,)


def on_refused_manifest(state: Control, event: ManifestDone) -> Decision:
    """Handle a failure to write the last manifest, although all shares are durable."""
    if state.phase is not Phase.FINALIZING or event.generation != state.resumed:
        return state, ()
    url = state.ending.final_url or state.config.checkpoint_url
    problem = event.problem or StorageProblem(url=url, operation="commit", reason=event.error)
    return _refused(state, problem, at_s=event.at_s)


def _refused(state: Control, problem: StorageProblem, *, at_s: float) -> Decision:
    """Try the rescue place once; after that, end the run."""
    rescue = state.config.rescue_url
    what = f"{problem.operation} {problem.url}: {problem.reason}"
    fields = {"generation": state.resumed, "step": state.step, "reason": what}
    events: tuple[Command, ...] = (Publish(t=at_s, event="checkpoint_failed", fields=fields),)
    events += _left_behind(state)
    if state.ending.final_url or not rescue:
        state, over = _end(state, problem, at_s=at_s)
        return state, (*events, *over)
    ending = replace(state.ending, final_url=rescue, final_problem=problem, finalized={})
    state = replace(state, ending=ending)
    order = Finalize(
        generation=state.resumed, step=state.step, checkpoint=True, term=state.term, url=rescue
    )
    return state, (*events, TellAll(workers=state.standing.seats, body=order))


def _left_behind(state: Control) -> tuple[DropFiles, ...]:
    """Commands that delete the shares written to the first place."""
    if state.ending.final_url:
        return ()
    shares = {worker: body.files for worker, body in state.ending.finalized.items()}
    return saves.dropped(shares)


def _end(state: Control, problem: StorageProblem, *, at_s: float) -> Decision:
    first = state.ending.final_problem or problem
    tried = f"; nor to {state.ending.final_url}: {problem.reason}" if state.ending.final_url else ""
    newest = newest_standing(state)
    failure = Failure(
        cause=Cause.STORAGE,
        error="StorageError",
        message=f"the checkpoint of step {state.step} cannot be written to {first.url}: "
        f"{first.reason}{tried}; it needs {bytes_text(state.ending.final_bytes)}",
        way_out=_way_out(newest),
        step=state.step,
        url=first.url,
        operation=first.operation,
    )
    status: Status = "failed" if newest is None else "short"
    return commits.end(state, status=status, failure=failure, at_s=at_s)


def _way_out(newest: int | None) -> str:
    if newest is None:
        return "make room there or set checkpoint.url to another place, then train again"
    return (
        f"make room there or set checkpoint.url to another place, then resume the run: its newest "
        f"checkpoint is of step {newest}"
    )


def newest_standing(state: Control) -> int | None:
    """The newest step from which the run could be resumed; None if there is none."""
    standing = [
        c.step
        for c in state.storage.checkpoints
        if is_valid(
            generation=c.generation, step=c.step, lineage=state.standing.lineage, resume_step=c.step
        )
    ]
    if state.config.resume is not None:
        standing.append(state.config.start_step)
    return max(standing, default=None)


def finish(state: Control, *, at_s: float) -> Decision:
    """End the run after its last checkpoint; a checkpoint in the rescue folder is a failure."""
    problem = state.ending.final_problem
    if problem is None:
        return _good_end(state, at_s=at_s)
    failure = Failure(
        cause=Cause.STORAGE,
        error="StorageError",
        message=f"the checkpoint of step {state.step} cannot be written to {problem.url}: "
        f"{problem.reason}; it is in {state.ending.final_url}",
        way_out="resume the run's folder once there is room: it goes on from there",
        step=state.step,
        url=problem.url,
        operation=problem.operation,
    )
    return commits.end(state, status="short", failure=failure, at_s=at_s)


def _good_end(state: Control, *, at_s: float) -> Decision:
    if state.step >= state.config.steps:
        return commits.end(state, status="finished", failure=None, at_s=at_s)
    if state.ending.preempted:
        message = f"stopped by {state.ending.stopping}"
        reason = Failure(cause=Cause.REQUEST, error="StoppedError", message=message)
        return commits.end(state, status="short", failure=reason, at_s=at_s)
    return commits.end(state, status="stopped", failure=None, at_s=at_s)

"""Decides whether a reported error or a process death is the fault of user code or of a node."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.poison import HUNG, common_samples, poisoned, signature_of, still_open
from lazarus.control.cluster.state import Control, Decision
from lazarus.control.commit import commits
from lazarus.control.membership import members
from lazarus.control.messages import UserError, WorkerDied
from lazarus.control.parts.blame import Death
from lazarus.control.ports import Command, Publish
from lazarus.failure import Cause, Failure


def on_user_error(state: Control, worker: str, body: UserError, *, at_s: float) -> Decision:
    """Handle the error of a rank that cannot go on: user code raised, or Lazarus itself did.

    An exception in user code ends the run at once, because the redo of the step would raise it
    again. There are two exceptions, in which only the node is lost: a node that is joining a
    training run, and a node that raised because of an injected fault while other members are left.
    An error of Lazarus counts against its node until a second node has one in the same step, or too
    few members would be left; then the run ends.
    """
    serial = state.roster.workers[worker].node
    failure = _said(serial, body)
    is_ours = failure.cause is not Cause.USER_CODE
    state, flushed = commits.flush(state, at_s=at_s)
    event = "internal_error" if is_ours else "user_error"
    commands: tuple[Command, ...] = (*flushed, published(state, failure, event=event, at_s=at_s))
    present = state.standing.members
    joining = bool(state.resumed and present) and serial not in present
    doomed = (body.on_purpose or serial in state.injected.doomed) and len(present) > 1
    if joining or doomed or (is_ours and is_alone(state, serial, step=body.step)):
        what = f"Lazarus failed: {body.error}" if is_ours else "user code raised"
        if is_ours:
            raised = (*state.blame.raised, (serial, body.step))
            state = replace(state, blame=replace(state.blame, raised=raised))
        state, more = members.lose(state, (serial,), cause=what, at_s=at_s)
    else:
        state, more = commits.end(state, status="failed", failure=failure, at_s=at_s)
    return state, (*commands, *more)


def _said(serial: int, body: UserError) -> Failure:
    return Failure(
        cause=body.cause,
        error="UserCodeError" if body.cause is Cause.USER_CODE else "InternalError",
        message=body.error,
        node=serial,
        rank=body.rank,
        step=body.step,
        phase=body.phase,
        sample_ids=body.sample_ids,
        place=body.place,
        traceback=body.traceback,
        shown=body.shown,
    )


def is_alone(state: Control, serial: int, *, step: int) -> bool:
    """Whether no other node raised in this step, and enough members are left without this node."""
    others = {node for node, at in state.blame.raised if at == step and node != serial}
    enough = len(state.standing.members) > max(1, state.config.min_nodes)
    return bool(state.resumed) and not others and enough


def on_death(state: Control, body: WorkerDied, *, at_s: float) -> Decision:
    """Handle the death of a process: lose its node, and end the run if user code is to blame.

    The node may already be lost. See ``poison`` for when deaths are blamed on user code.
    """
    state, commands = members.on_died(state, body, at_s=at_s)
    if any(gone.worker == body.worker for gone in state.blame.unexplained):
        left = tuple(gone for gone in state.blame.unexplained if gone.worker != body.worker)
        state = replace(state, blame=replace(state.blame, unexplained=left))
    node = body.worker.rpartition(".")[0]
    is_hung = node in state.blame.hung
    death = Death(
        worker=body.worker,
        node=node,
        generation=body.generation,
        step=body.step,
        phase=body.phase,
        signature=HUNG if is_hung else signature_of(body.cause, body.crash),
        sample_ids=tuple(body.sample_ids),
        place=body.place,
        crash=body.crash,
        shown=body.shown,
    )
    if not _counts(state, death):
        return state, commands
    open_ones = still_open(state.blame.deaths, step=state.step)
    state = replace(state, blame=replace(state.blame, deaths=(*open_ones, death)))
    if death.is_own:
        commands = (*commands, _in_user_code(body, death, at_s=at_s))
    guilty = poisoned(state.blame.deaths)
    if not guilty:
        return state, commands
    failure = _failure(guilty)
    commands = (*commands, published(state, failure, event="user_error", at_s=at_s))
    state, more = commits.end(state, status="failed", failure=failure, at_s=at_s)
    return state, (*commands, *more)


def _counts(state: Control, death: Death) -> bool:
    """Whether a death counts against user code.

    It must have happened inside a user function, at an uncommitted step, not because of an injected
    fault, and must not be counted already.
    """
    known = any(other.worker == death.worker for other in state.blame.deaths)
    struck = any(worker.rpartition(".")[0] == death.node for worker, _ in state.injected.struck)
    inside = death.phase or (death.crash and death.place)
    fresh = inside and still_open((death,), step=state.step)
    return bool(fresh) and not (known or struck or death.node in state.blame.excused)


def _in_user_code(body: WorkerDied, death: Death, *, at_s: float) -> Publish:
    fields = {
        "generation": death.generation,
        "worker": death.worker,
        "rank": body.rank,
        "step": death.step,
        "phase": death.phase,
        "sample_ids": list(death.sample_ids),
        "cause": death.signature,
        "where": death.place,
        "traceback": death.crash,
    }
    return Publish(t=at_s, event="worker_died", fields=fields)


def _failure(deaths: tuple[Death, ...]) -> Failure:
    last, ids = deaths[-1], common_samples(deaths)
    how = sorted({d.signature or "gone without a word" for d in deaths})
    names = ", ".join(d.worker for d in deaths)
    where = f"{last.phase} at {last.place}" if last.place else last.phase
    samples = f", samples {', '.join(map(str, ids[:16]))}" if ids else ""
    did = "stood still on" if how == [HUNG] else "ended the processes of"
    text = (
        f"poisoned step {last.step}: {where} {did} {len(deaths)} nodes one after the other "
        f"({names}: {', '.join(how)}{samples})"
    )
    return Failure(
        cause=Cause.USER_CODE,
        error="PoisonedStepError",
        message=text,
        step=last.step,
        phase=last.phase,
        sample_ids=ids,
        place=last.place,
        traceback=last.crash,
        shown=last.shown,
    )


def published(state: Control, failure: Failure, *, event: str, at_s: float) -> Publish:
    """The event of the record that says where a failure happened, and what it was."""
    fields = {
        "generation": state.generation,
        "node": failure.node,
        "rank": failure.rank,
        "step": failure.step,
        "phase": failure.phase,
        "sample_ids": list(failure.sample_ids),
        "where": failure.place,
        "error": failure.message,
        "traceback": failure.traceback,
    }
    return Publish(t=at_s, event=event, fields=fields)

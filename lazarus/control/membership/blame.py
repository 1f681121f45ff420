"""Who is to blame for what a worker says of itself, or for how it died."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.poison import (
    HUNG,
    Death,
    common_samples,
    poisoned,
    signature_of,
    still_open,
)
from lazarus.control.cluster.state import Control, Decision
from lazarus.control.commit import commits
from lazarus.control.membership import members
from lazarus.control.messages import UserError, WorkerDied
from lazarus.control.ports import Command, Publish
from lazarus.failure import Cause, Failure


def on_user_error(state: Control, worker: str, body: UserError, *, at_s: float) -> Decision:
    """A rank cannot go on: the user's code raised there, or ours did.

    The user's code ends the run at its first exception: it would raise again at the redo. A joiner
    that lacks something, or reads other data, must not end what others train; nor says a node that
    was told to raise anything of the user's code. An error of ours is evidence about its node alone
    until a second node has one in the same step.
    """
    serial = state.workers[worker].node
    failure = _said(serial, body)
    is_ours = failure.cause is not Cause.USER_CODE
    state, flushed = commits.flush(state, at_s=at_s)
    told = replace(
        _blamed(state, failure, at_s=at_s), event="internal_error" if is_ours else "user_error"
    )
    commands: tuple[Command, ...] = (*flushed, told)
    joining = bool(state.resumed and state.members) and serial not in state.members
    doomed = (body.on_purpose or serial in state.doomed) and len(state.members) > 1
    if joining or doomed or (is_ours and is_alone(state, serial, step=body.step)):
        what = f"Lazarus failed: {body.error}" if is_ours else "user code raised"
        if is_ours:
            state = replace(state, raised=(*state.raised, (serial, body.step)))
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
    """Whether no other node failed in this step, and enough are left to go on without this one."""
    others = {node for node, at in state.raised if at == step and node != serial}
    enough = len(state.members) > max(1, state.config.min_nodes)
    return bool(state.resumed) and not others and enough


def on_death(state: Control, body: WorkerDied, *, at_s: float) -> Decision:
    """A process has ended; its node may be known as lost already. Was it the user's code?"""
    state, commands = members.on_died(state, body, at_s=at_s)
    if any(gone.worker == body.worker for gone in state.unexplained):
        left = tuple(gone for gone in state.unexplained if gone.worker != body.worker)
        state = replace(state, unexplained=left)
    node = body.worker.rpartition(".")[0]
    is_hung = node in state.hung
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
    open_ones = still_open(state.deaths, step=state.step)
    state = replace(state, deaths=(*open_ones, death))
    if death.is_own:
        commands = (*commands, _told(state, body, death, at_s=at_s))
    guilty = poisoned(state.deaths)
    if not guilty:
        return state, commands
    failure = _failure(guilty)
    commands = (*commands, _blamed(state, failure, at_s=at_s))
    state, more = commits.end(state, status="failed", failure=failure, at_s=at_s)
    return state, (*commands, *more)


def _counts(state: Control, death: Death) -> bool:
    """Inside a function of the user's, in a step that is not committed, and not on purpose."""
    known = any(other.worker == death.worker for other in state.deaths)
    struck = any(worker.rpartition(".")[0] == death.node for worker, _ in state.struck)
    inside = death.phase or (death.crash and death.place)
    fresh = inside and still_open((death,), step=state.step)
    return bool(fresh) and not (known or struck or death.node in state.excused)


def _told(state: Control, body: WorkerDied, death: Death, *, at_s: float) -> Publish:
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


def _blamed(state: Control, failure: Failure, *, at_s: float) -> Publish:
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
    return Publish(t=at_s, event="user_error", fields=fields)

"""Failed and stalled collectives: which node to suspect if none has died (rule 16)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.commit import commits
from lazarus.control.membership import members
from lazarus.control.messages import Suspicion
from lazarus.control.reconfiguration import reconfigure as change
from lazarus.control.reconfiguration.holding import storage_failure
from lazarus.control.reconfiguration.parting import STALLED
from lazarus.failure import Cause, Failure, Status

MAX_ERRORS = 3  # generations in a row that end in an error, without a death or a commit
MAX_ATTEMPTS = 10  # the same, if no error points to a node

AGAIN = "collectives fail again and again"


def on_suspicion(state: Control, worker: str, body: Suspicion, *, at_s: float) -> Decision:
    """Note that a rank's collective failed, and wait for the cause.

    The news of the node loss that broke the collective usually follows within milliseconds, so
    nothing is done for ``suspicion_grace_s``; see ``is_due``. A report of an unreadable copy is
    handled at once.
    """
    if body.bad_source:
        return _on_bad_source(state, body, at_s=at_s)
    steady = state.phase in (Phase.RUNNING, Phase.RECONNECTING)
    current = state.resumed if steady else state.generation
    if not (steady or state.phase is Phase.PREPARING) or body.generation != current:
        return one_more_stale(state), ()
    node = state.roster.workers[worker].node
    if node not in state.blame.complaints and not body.store:
        complaints = (*state.blame.complaints, node)
        state = replace(state, blame=replace(state.blame, complaints=complaints))
    if state.blame.suspicion_s is None:
        state = replace(state, blame=replace(state.blame, suspicion_s=at_s))
    return state, ()


def _on_bad_source(state: Control, body: Suspicion, *, at_s: float) -> Decision:
    """Exclude a copy that cannot be read, and begin again if a restore was using the copy."""
    if body.storage_url:
        refusal = (body.storage_url, body.operation, body.error)
        refused = state.storage.refused | {body.bad_source}
        state = replace(state, storage=replace(state.storage, refused=refused, refusal=refusal))
    if not state.resumed:
        failure = storage_failure(
            replace(
                state,
                storage=replace(
                    state.storage, refusal=(body.storage_url, body.operation, body.error)
                ),
            ),
            what="cannot start",
        )
        status: Status = "failed" if state.config.resume is None else "short"
        return commits.end(state, status=status, failure=failure, at_s=at_s)
    bad = state.storage.bad_sources | {body.bad_source}
    state = replace(state, storage=replace(state.storage, bad_sources=bad))
    reading = state.phase in (Phase.ALIGNING, Phase.PREPARING)
    if not reading or body.generation != state.generation:
        return state, ()
    return change.begin(state, reason="damaged_copy", at_s=at_s)


def is_due(state: Control, *, at_s: float) -> bool:
    """Whether the grace period since the first failed collective is over."""
    grace = state.config.timeouts.suspicion_grace_s
    return state.blame.suspicion_s is not None and at_s - state.blame.suspicion_s >= grace


def all_wait(state: Control, *, at_s: float) -> bool:
    """Whether every rank waits inside a collective, without progress for longer than the limit.

    All ranks still answer, so no single rank is to blame: the data path between them is broken, or
    user code made them run different collectives. While groups are built the limit is
    ``group_wait_s`` instead of ``no_progress_s``.
    """
    timeouts = state.config.timeouts
    if state.phase is Phase.RUNNING:
        awaited = [w for w in state.standing.seats if w not in state.pausing.paused]
        limit_s = timeouts.no_progress_s
    elif state.phase is Phase.PREPARING and state.transition is not None:
        transition = state.transition
        awaited = [s.worker for s in transition.feeders if s.worker not in transition.ready]
        limit_s = timeouts.group_wait_s
    else:
        return False
    known = [state.roster.workers.get(worker) for worker in awaited]
    return bool(known) and all(
        w is not None and w.waiting and at_s - max(state.phase_s, w.progress_s) > limit_s
        for w in known
    )


def on_stall(state: Control, *, at_s: float) -> Decision:
    """Fence the stalled generation: each rank reports where it waits, and groups are rebuilt."""
    state = replace(state, blame=replace(state.blame, complaints=()))
    return settle(state, at_s=at_s, reason=STALLED)


def settle(state: Control, *, at_s: float, reason: str = "collective_error") -> Decision:
    """Begin a new generation with the same members, or lose the node that keeps failing.

    The first two complaints of a generation come from both ends of a broken link; the other ranks
    fail only after these two give up. After ``MAX_ERRORS`` such generations the higher serial of
    the pair named most often is lost. After ``MAX_ATTEMPTS`` generations the run ends.
    """
    errors = (*state.blame.errors, state.blame.complaints[:2])
    state = replace(state, blame=replace(state.blame, errors=errors, complaints=()))
    taking_part = set(state.standing.members)
    if state.transition is not None:
        taking_part |= set(state.transition.next_nodes)
    telling = tuple(pair for pair in errors if pair)
    odd = culprit(telling, alive=taking_part)
    if odd is not None and len(telling) >= MAX_ERRORS and len(taking_part) > 1:
        return members.lose(state, (odd,), cause=AGAIN, at_s=at_s, is_excused=True)
    if len(errors) >= MAX_ATTEMPTS:
        return commits.end(state, status="short", failure=_nobody_knows(), at_s=at_s)
    return change.begin(state, reason=reason, at_s=at_s)


def _nobody_knows() -> Failure:
    return Failure(
        cause=Cause.INTERNAL,
        message=f"groups of ranks broke {MAX_ATTEMPTS} times in a row without a step between, and "
        "nothing says which node is at fault",
        way_out="look at the network between the nodes and to the controller, then resume the run",
    )


def culprit(errors: tuple[tuple[int, ...], ...], *, alive: set[int]) -> int | None:
    """The higher serial of the two nodes that are named most often; None if no node is named.

    Args:
        errors: Nodes that complained first, one tuple for each failed generation.
        alive: Nodes to choose from.
    """
    times = Counter(node for pair in errors for node in pair if node in alive)
    ranked = sorted(times, key=lambda node: (-times[node], node))
    return max(ranked[:2], default=None)

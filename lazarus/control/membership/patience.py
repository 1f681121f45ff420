"""Time limits: how long each phase waits, for what, and what happens then. PURE.

S is ``tolerated_stall_s``; ``standstill_s`` is 60 S, at least 600 s. A node that is silent for S
is lost in any phase (``members.silent``). The limits on workers count from their last progress.

| phase        | waits for                           | for                   | then               |
|--------------|-------------------------------------|-----------------------|--------------------|
| GATHERING    | nodes to start                      | start, quorum timeout | ends short         |
| RUNNING      | a thread that others wait for       | S                     | node lost          |
| RUNNING      | a thread that nobody waits for      | standstill_s          | node lost          |
| RUNNING      | vectors, when all have paused       | S                     | asked by a fence   |
| FENCING      | reports                             | S                     | node lost          |
| ALIGNING     | applies                             | S                     | node lost          |
| ALIGNING     | a checkpoint in flight              | S                     | goes on without it |
| ALIGNING     | a recovery policy that says hold    | start timeout         | it is passed over  |
| PREPARING    | transfers                           | S                     | node lost          |
| RUNNING      | ranks that all wait in a collective | S                     | asked by a fence   |
| PREPARING    | ranks that all wait in a collective | 3 S                   | asked by a fence   |
| PREPARING    | the launcher's word on a death      | S                     | goes on without it |
| RECONNECTING | a first member to come back         | 6 S                   | nodes lost         |
| RECONNECTING | the others, from then on            | S                     | nodes lost         |
| HOLDING      | nodes to come                       | quorum timeout        | ends short         |
| FINALIZING   | a rank's last share and digest      | 6 S                   | node lost          |
| FINALIZING   | the last manifest                   | standstill_s          | ends without it    |
"""

from __future__ import annotations

from lazarus.control.cluster.state import Control, Decision, Phase
from lazarus.control.commit import commits
from lazarus.failure import Cause, Failure, Status


def finalizing_too_long(state: Control, *, at_s: float) -> tuple[int, ...]:
    """Nodes with a rank that owes its last digest or share and makes no progress, by serial.

    A rank makes progress with every tensor that it digests, and while it watches its storage
    thread. It gives up on that thread after the same time without a byte (``checkpoint.patience``)
    and reports the failure itself.
    """
    if state.phase is not Phase.FINALIZING:
        return ()
    digested = () if state.ending.digest else state.ending.digests.get(state.step, {})
    owing = [
        w
        for w in state.standing.seats
        if w in state.roster.workers
        and (w not in state.ending.finalized or (not state.ending.digest and w not in digested))
    ]
    limit = state.config.timeouts.final_s
    late = {
        state.roster.workers[w].node
        for w in owing
        if at_s - max(state.phase_s, state.roster.workers[w].progress_s) > limit
    }
    return tuple(sorted(late))


def has_lost_vectors(state: Control, *, at_s: float) -> bool:
    """Whether commit vectors are overdue although all ranks have paused; the caller checks that."""
    since_s = max(state.pausing.paused_s, state.committed.flushed_s)
    return at_s - since_s > state.config.timeouts.report_s


def manifest_too_long(state: Control, *, at_s: float) -> bool:
    """Whether the last manifest has been pending for longer than ``standstill_s``."""
    pending = state.phase is Phase.FINALIZING and state.ending.manifest_pending
    return pending and at_s - state.ending.finalized_s > state.config.timeouts.standstill_s


def end_without_manifest(state: Control, *, at_s: float) -> Decision:
    """End the run without its last checkpoint, because the storage does not answer."""
    waited_s = at_s - state.ending.finalized_s
    newest = max((c.step for c in state.storage.checkpoints), default=0)
    stands = f"the newest is of step {newest}" if newest else "there is none"
    failure = Failure(
        cause=Cause.STORAGE,
        message=f"the last checkpoint was not written within {waited_s:.0f} s; {stands}",
        step=state.step,
        url=state.config.checkpoint_url,
        operation="write",
    )
    status: Status = "short" if newest else "failed"
    return commits.end(state, status=status, failure=failure, at_s=at_s)

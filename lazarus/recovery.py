"""Types for writing a recovery policy.

A policy is called as ``policy(losses, view, now_s=...)`` when experts have no live replica left.
The policy returns one of the known copies for each lost expert, or ``Rollback``, ``Hold`` or
``Stop``:

    def newest_anywhere(losses, view, *, now_s):
        return {(x.layer, x.expert): max(x.copies, key=lambda copy: copy.step) for x in losses}

An answer that cannot be carried out is not used. ``recovery.on_lost_expert`` then decides, and the
record gets a ``plan_fallback`` event with the reason.
"""

from lazarus.checkpoint.restoring.policy import Answer, ClusterView, Hold, RecoveryPolicy, Stop
from lazarus.checkpoint.restoring.restore_choice import Copy, Rollback, Source, StoredCheckpoint
from lazarus.checkpoint.restoring.restore_choice import Loss as ExpertLoss

__all__ = [
    "Answer",
    "ClusterView",
    "Copy",
    "ExpertLoss",
    "Hold",
    "RecoveryPolicy",
    "Rollback",
    "Source",
    "Stop",
    "StoredCheckpoint",
]

"""For recovery policies: what they are asked, and what they may answer.

A policy is called as ``policy(losses, view, now_s=...)`` when experts have no live replica left.
It returns one of the known copies for each of them, ``Rollback``, ``Hold`` or ``Stop``:

    def newest_anywhere(losses, view, *, now_s):
        return {(x.layer, x.expert): max(x.copies, key=lambda copy: copy.step) for x in losses}

An answer that cannot be carried out is not used: ``recovery.on_lost_expert`` decides, and the
record says why (``plan_fallback``).
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

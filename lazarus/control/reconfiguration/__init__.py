"""Journey of a change: claim, fence, verdict, align, plan, prepare, resume (rules 16 to 27).

The rules are in docs/protocol.md. Start reading at ``reconfigure.py``; ``resuming.py`` is its last
step. ``repair.py`` and ``parting.py`` deal with replicas and ranks that differ.
"""

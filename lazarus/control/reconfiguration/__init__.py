"""Reconfigurations: claim, fence, verdict, align, plan, prepare, resume (rules 16 to 27).

The rules are in docs/protocol.md. Start reading at ``reconfigure.py``; ``resuming.py`` is the last
step of a reconfiguration. ``repair.py`` deals with replicas that differ, ``parting.py`` with ranks
that run different layers or models, ``timeline.py`` measures the time of each phase.
"""

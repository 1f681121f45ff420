"""Reconfigurations: claim, fence, verdict, align, plan, prepare, resume (rules 16 to 27).

The rules are in docs/protocol.md. Start reading at ``reconfigure.py``; then come
``preparing.py`` and, as the last step of a reconfiguration, ``resuming.py``. ``holding.py`` is what
happens without enough nodes or replicas. ``repair.py`` deals with replicas that differ,
``parting.py`` with ranks that run different layers or models, ``timeline.py`` measures the time of
each phase.
"""

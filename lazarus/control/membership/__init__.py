"""Membership: nodes and workers that join, leave, die or fall silent, and the cause of failures.

Start reading at ``members.py``; ``notices.py`` deals with what is announced: leaves, missing nodes,
bad machines. ``checks.py`` finds malformed messages and ``refusals.py`` drops them.
``suspicion.py`` handles failed and stalled collectives, ``patience.py`` lists and sets the time
limits of every phase, ``blame.py`` tells user errors from node failures, and
``injected_faults.py`` records faults on purpose.
"""

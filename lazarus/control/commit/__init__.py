"""Commits: from the summed vector of a step to its published commit, and the end of the run.

Start reading at ``commits.py``. ``finalizing.py`` handles the last digest and checkpoint,
``exactly_once.py`` the samples of committed steps, ``measures.py`` the metrics that users log, and
``unfired.py`` reports scripted faults that never fired.
"""

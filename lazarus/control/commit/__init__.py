"""Journey of a step: from its summed vector to a published commit, and at last the run's end.

Start reading at ``commits.py``. ``finalizing.py`` is the last digest and the last checkpoint,
``exactly_once.py`` says which samples a committed step has.
"""

"""State that a worker's training thread and control thread share.

Start reading at ``ledger.py``, which decides under one lock whether a step commits.
``observer.py`` reports progress and fires scripted faults; ``trail.py`` and ``whereabouts.py``
note which exchange and which user function the rank is in.
"""

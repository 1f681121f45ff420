"""Where a worker's two threads meet: what may be decided, where the training thread is.

Start reading at ``ledger.py``: one lock. ``observer.py`` reports progress and strikes scripted
faults, ``trail.py`` and ``whereabouts.py`` say which exchange and which user function a rank is
in.
"""

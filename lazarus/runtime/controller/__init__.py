"""The controller's process: one queue of events, one consumer, one ``decide``.

Start reading at ``shell.py``. ``streams.py`` talks to workers and driver; ``chronicle.py`` writes
the journal for a successor and the record for everybody; ``manifests.py`` commits checkpoints.
"""

"""The controller's process: a queue of events, a loop that decides on each, and its side effects.

Start reading at ``shell.py``. ``streams.py`` talks to workers and the driver; ``chronicle.py``
writes the journal (for the next controller) and the record (for users); ``manifests.py`` commits
checkpoints.
"""

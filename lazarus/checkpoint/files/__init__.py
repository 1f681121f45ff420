"""Checkpoints at a URL: write, find, read, verify, export, and delete old ones. EFFECTS.

Start reading at ``store.py``; ``storage.py`` is the only module that touches files.
"""

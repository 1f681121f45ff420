"""Checkpoints at a URL: written, found, read, verified, retained, exported. EFFECTS.

Start reading at ``store.py``; ``storage.py`` is the only module that touches files.
"""

"""Checkpoints at a URL: write, find, read, verify, export, and delete old ones. EFFECTS.

Start reading at ``store.py``: ``write_files`` makes the data files of a step, ``commit_manifest``
turns them into a checkpoint. ``storage.py`` is the only module that touches files; each byte goes
through its ``write_file``.
"""

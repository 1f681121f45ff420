"""Partial expert checkpoints in host memory and on storage.

Workers, keepers and the controller all use this package. Start reading at ``format/manifest.py``,
which defines a checkpoint, and at ``files/storage.py``, the only module that opens files.
``selection/`` decides which rank saves which experts at which step, ``in_memory/`` and ``files/``
store them, ``restoring/`` chooses the copy that a lost expert is restored from.
"""

"""Partial expert checkpoints: in host memory, on storage, and what is true of them.

Used by workers, keepers and the controller alike. Start reading at ``format/manifest.py``: what a
checkpoint is. ``selection/`` says who saves which experts when, ``in_memory/`` and ``files/`` hold
them, ``restoring/`` chooses what a lost expert comes back from.
"""

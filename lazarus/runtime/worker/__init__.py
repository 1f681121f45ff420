"""A worker: the process of one rank, with a thread that trains and a thread that obeys.

Start reading at ``process.py``; ``rank.py`` is the rank's state between orders. What it does in a
step is in ``training/``.
"""

"""Training data: which samples make up a step, and how the ranks share them.

``sampler.py`` and ``stream.py`` are pure bookkeeping that ranks and controller agree on; what a
rank really reads is in ``runtime/input``. ``corpus.py`` is the text that a run takes by default.
"""

"""Training data: which samples make up a step, and how ranks share them.

``sampler.py`` and ``stream.py`` are pure bookkeeping that ranks and the controller agree on;
``runtime/input`` reads the samples. ``corpus.py`` is the text a run trains on by default.
"""

"""Checkpoints as the controller sees them: which there are, and what is lost without them.

``saves.py`` collects shares and orders manifests, ``adapting.py`` follows measured rates,
``losses.py`` chooses where an expert without a live replica comes back from.
"""

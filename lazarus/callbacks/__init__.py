"""Callbacks: told of what was committed, in the driver, after the fact; never blocking it.

``callbacks.py`` has the base class and those that are configured by name, ``bus.py`` hands them
the record's events, ``prometheus.py`` feeds a Ray cluster's metrics.
"""

from lazarus.callbacks.callbacks import Callback, Jsonl, TensorBoard, WandB, configured

__all__ = ["Callback", "Jsonl", "TensorBoard", "WandB", "configured"]

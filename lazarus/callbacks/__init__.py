"""Callbacks: receive the events of a run in the driver, without blocking training.

``callbacks.py`` has the base class and the built-in callbacks, ``bus.py`` delivers the record's
events to callbacks, ``prometheus.py`` exports the events as Ray metrics.
"""

from lazarus.callbacks.callbacks import Callback, Jsonl, TensorBoard, WandB, configured

__all__ = ["Callback", "Jsonl", "TensorBoard", "WandB", "configured"]

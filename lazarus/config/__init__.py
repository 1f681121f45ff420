"""The configuration of a run: frozen dataclasses that are checked when they are made.

The driver reads the configuration and sends it to every process. Start reading at
``train_config.py``; each key with its type, default and range is in ``sections.py`` or
``training_sections.py``. ``layers.py`` merges files, environment and ``--set``; ``values.py`` knows
the types and notation of values; ``preflight.py`` finds problems before anything starts;
``changes.py`` says which keys may differ when a run is resumed; ``timeouts.py`` derives every
time-out.
"""

"""The record of a run: its events, the metrics computed from them, and the run's end.

The controller writes the record; everything else only reads it, also without a running process.
Start reading at ``events.py``, which lists every event and its fields. ``metrics.py`` computes
goodput, ETTR and PLT, ``typed.py`` turns events into dataclasses, ``endings.py`` handles the end of
a run, ``ownership.py`` the owner of its folder. ``journal_reader.py`` reads the controller's
journal.
"""

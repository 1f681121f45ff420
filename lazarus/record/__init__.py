"""The record of a run: its events, what they come to, and how the run ended.

The controller writes it, everybody else reads it; nothing here needs a running process. Start
reading at ``events.py``, which names every event and its fields. ``metrics.py`` computes goodput,
ETTR and PLT from them, ``typed.py`` makes them records, ``endings.py`` says how a run ended, and
``ownership.py`` who owns its folder. ``journal_reader.py`` reads the controller's journal.
"""

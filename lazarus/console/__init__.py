"""Output on the terminal during a run.

This code runs in the driver and in ``lazarus events``. ``narrator.py`` turns events into
sentences; ``progress.py`` prints them, and a status line that is redrawn.
"""

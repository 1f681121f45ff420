"""What people see on a terminal while a run goes on.

Runs in the driver and in ``lazarus events``. ``narrator.py`` turns events into sentences,
``progress.py`` prints them beside one line that is redrawn.
"""

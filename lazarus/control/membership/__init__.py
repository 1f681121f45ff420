"""Who is there: nodes and workers that join, leave, die or fall silent, and whom to blame.

Start reading at ``members.py``. ``checks.py`` refuses messages that cannot be, ``suspicion.py``
decides when all ranks wait, ``patience.py`` bounds every phase, ``blame.py`` names the cause.
"""

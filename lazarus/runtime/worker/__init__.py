"""The worker: the process of one rank, with a training thread and a control thread.

Start reading at ``process.py``. ``rank.py`` carries out the controller's orders on what
``parts.py`` makes once: ``preparation.py`` a PREPARE, ``generation.py`` what lasts from a RESUME to
the next fence, in which ``training_loop.py`` trains and ``training/`` computes a step.
"""

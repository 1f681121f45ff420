"""The driver: the user's process, which owns every other process of the run.

Start reading at ``driver.py``. ``nodes.py`` starts nodes and replaces lost ones,
``controller_life.py`` and ``restarts.py`` keep a controller alive, ``chaos.py`` draws random
faults.
"""

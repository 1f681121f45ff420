"""Starts and ends the run's processes: plain processes on this machine, or Ray actors.

Runs in the driver, and on Ray in each node's actor (``ray_actors.py``). Start reading at
``launcher.py``: the ``Launcher`` interface and the one for plain processes. ``ray_launcher.py``
has the one for Ray.
"""

"""Starting and ending processes: plain ones on this machine, or actors on Ray.

Runs in the driver, and on Ray in each node's actor (``ray_actors.py``). Start reading at
``launcher.py``, the port with its two adapters; ``ray_launcher.py`` is the one for Ray.
"""

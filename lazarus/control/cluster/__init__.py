"""What the controller knows: one frozen value, and questions about it.

Start reading at ``state.py``: phases, settings, and the parts of the state. ``transition.py`` is
one attempt to reach the next generation. ``roster.py`` answers who is there, ``evidence.py`` what
is held against nodes and must outlive the controller; ``replacing.py`` is the driver's own small
state: which nodes it starts where.
"""

"""The control plane as pure functions: ``decide(state, event) -> (state, commands)``.

It runs in the controller's process, and in the simulator; no clock, no network, no torch. Start
reading at ``machine.py``, then ``cluster/state.py`` for the phases. ``messages.py`` is what
controller, workers and driver say to each other, ``ports.py`` the events and commands, and
``vector.py`` the commit vector. Journeys: a rank joins or is lost (``membership/``), the run
changes shape (``reconfiguration/``), a step commits or the run ends (``commit/``), state is saved
(``saving/``), the controller itself comes back (``restart/``).
"""

"""The control plane as pure functions: ``decide(state, event) -> (state, commands)``.

The package runs in the controller's process and in the simulator, without a clock, network or
torch. Start reading at ``machine.py``, then ``cluster/state.py`` for the phases. ``messages.py``
declares the messages between controller, workers and driver, ``ports.py`` the events and commands,
``vector.py`` the commit vector, and ``parts/`` the parts of the state. One folder each deals with
nodes that join or are lost (``membership/``), reconfigurations (``reconfiguration/``), commits and
the end of the run (``commit/``), checkpoints (``saving/``), and a restart of the controller
(``restart/``).
"""

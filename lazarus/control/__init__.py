"""The control plane as pure functions: ``decide(state, event) -> (state, commands)``.

The package runs in the controller's process and in the simulator, without a clock, network or
torch. The shell around it (``runtime/controller/``) turns what happens into events, calls
``machine.decide`` for one event at a time, and carries out the commands in their order.

**One decision.** An event is a message of a worker or of the driver, a stream that closed, a
manifest that was written, or a tick of the clock. ``machine.decide`` first lets the module of the
event's subject react to it; then ``settling.py`` starts whatever the new state calls for; last,
what was found out about nodes is added to the journal. A message of an older generation is counted
and changes nothing else; a message that contradicts the state is refused.

**Phases.** The run is in one phase at a time (``cluster/state.py: Phase``)::

    GATHERING --> FENCING --> ALIGNING --> PREPARING --> RUNNING --> FINALIZING --> ENDED
                     ^                                      |
                     +---------- the next generation -------+

* *Start:* GATHERING waits for the first nodes. When they are ready, a generation is claimed.
* *Change:* A loss, or a pause of all ranks because a node joins or leaves or because another
  placement is better, leads from RUNNING to FENCING: ``reconfiguration/reconfigure.py: begin``
  journals the claim of the next generation and fences its workers. When all reports are in, the
  verdict says which step counts (ALIGNING). When all workers have aligned, they get the plan
  (PREPARING). When all are ready, ``reconfiguration/resuming.py`` journals the RESUME (RUNNING).
* *Another loss* in these three phases discards the attempt and claims the next generation.
* *Too few nodes:* HOLDING keeps the state in memory and leads to FENCING when nodes come.
* *All members lost:* HOLDING waits for new nodes, which load a checkpoint; before the first RESUME
  it is GATHERING that waits.
* *The controller's death:* RECONNECTING waits for the workers of the newest generation, which
  train on meanwhile. If all come back undisturbed, RUNNING goes on, otherwise a change begins.
* *End:* After the last step, or a stop, all ranks pause; FINALIZING waits for their digests and for
  the last checkpoint, and ENDED answers nothing any more.

Which event leads from which phase to which, and with which commands, is one table, which is made
from the machine itself: ``docs/control_states.md``. Every phase has a bound on how long it may
last; ``membership/patience.py`` lists the bounds.

**Where to read.** ``machine.py`` is the entry; ``cluster/state.py`` and ``parts/`` are the state.
``messages.py`` declares the messages between controller, workers and driver, ``ports.py`` the
events and commands, ``vector.py`` the commit vector. One folder each deals with nodes that join or
are lost (``membership/``), reconfigurations (``reconfiguration/``), placement plans and verdicts
(``plans/``), commits and the end of the run (``commit/``), checkpoints (``saving/``), and a restart
of the controller (``restart/``).
"""

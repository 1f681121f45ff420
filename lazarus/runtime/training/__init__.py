"""One optimizer step, and the work between two steps: evaluation, comparison, hooks.

Runs in the training thread of a worker. Start reading at ``step.py``. ``world.py`` is the
generation that a step computes in; ``factory.py`` makes a rank's parts from the configuration and
the user's code.
"""

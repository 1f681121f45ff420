"""What-if: the production decisions on a virtual clock.

Runs in one process without torch. ``rows.py`` is what a simulated run is asked and answers,
``fleet/`` feeds events to the production ``decide``, ``studies/`` are the experiments.
"""

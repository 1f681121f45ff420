"""The simulator: the production controller's decisions on a virtual clock.

A simulation runs in one process without PyTorch. ``rows.py`` defines settings and results,
``fleet/`` feeds events to the production ``decide``, ``systems/`` has the compared policies,
``studies/`` has the experiments.
"""

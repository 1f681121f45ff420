"""The commands of ``lazarus``: each module with a ``register`` is one.

They run in the process of the command line; ``lazarus/cli.py`` finds them. ``runs.py`` finds the
run that a command is about, ``machine_checks.py`` is what ``lazarus doctor`` looks at.
"""

"""The parts of the controller's state, one file for each subject; ``cluster/state.py`` joins them.

A part is a frozen dataclass without decisions of its own. Every module of the control plane may
read every part; the docstring of a part names the modules that decide about it. Times (``_s``) are
seconds on the clock of the events, unless a comment says otherwise.
"""

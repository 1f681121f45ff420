"""Placement and recovery policies of somebody else.

They are asked in the controller's process. ``named.py`` finds one by dotted path or entry point;
``checked.py`` asks it with a bound on time and uses an answer only if it holds.
"""

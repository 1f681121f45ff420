"""Placement and recovery policies written by users.

Policies are called in the controller's process. ``named.py`` imports a policy by dotted path or
entry point; ``checked.py`` calls it with a time limit and uses only valid answers.
"""

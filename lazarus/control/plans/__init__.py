"""Plans: what the planner is asked, and the verdict that a recovery begins with.

``planning.py`` asks, ``verdict.py`` says what survivors' reports prove, ``healing.py`` is a plan
whose replicas are still on their way, ``tuning.py`` is what running steps teach.
"""

"""Plans: the request to the placement policy, and the verdict that a recovery begins with.

``planning.py`` builds the request, ``verdict.py`` decides from reports whether a step is committed
and who sends what, ``healing.py`` handles replicas that are transferred after RESUME, and
``tuning.py`` adapts sample shares and the plan to measured steps.
"""

"""Plans: the request to the placement policy, and the verdict that a recovery begins with.

Start reading at ``planning.py``: ``plan_for`` builds the request and asks the policy. Its caller,
after a loss as after a join, is ``reconfiguration/preparing.py: prepare``. ``verdict.py`` decides
from reports whether a step is committed and who sends what, ``healing.py`` handles replicas that
are transferred after RESUME, and ``tuning.py`` adapts sample shares and the plan to measured steps.
"""

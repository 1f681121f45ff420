"""From a template and loads to a plan: assigns every replica to a node.

Start with ``select.py``, which chooses the template, and ``build.py``, which makes the plan.
"""

"""The probability that every expert survives k lost nodes, exact wherever possible.

Start with ``resilience.py``, which chooses among the methods of the other modules.
"""

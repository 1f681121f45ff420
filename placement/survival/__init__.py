"""The probability that every expert survives k lost nodes, exactly wherever possible.

Start reading at ``resilience.py``, which chooses among the methods of the other modules.
"""

"""Number of replicas of each expert, and the share of its tokens that each replica serves.

``allocate.py`` counts replicas, ``shares.py`` splits tokens, ``level.py`` moves replicas off
overloaded nodes.
"""

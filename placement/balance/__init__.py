"""How many replicas each expert gets, and which share of its tokens each of them serves.

``allocate.py`` counts replicas, ``shares.py`` splits tokens, ``level.py`` repairs what is uneven.
"""

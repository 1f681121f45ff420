"""A fleet on a virtual clock, which carries out what the production controller orders.

Start reading at ``fleet.py``; ``training.py`` is the steps, ``bodies.py`` what workers say.
"""

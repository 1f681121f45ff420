"""A simulated fleet that carries out the production controller's commands on a virtual clock.

Start with ``fleet.py``; ``training.py`` simulates steps, ``bodies.py`` builds workers' messages.
"""

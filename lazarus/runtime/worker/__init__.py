"""The worker: the process of one rank, with a training thread and a control thread.

Start reading at ``process.py``; ``rank.py`` carries out the controller's orders, and
``training/`` computes a step.
"""

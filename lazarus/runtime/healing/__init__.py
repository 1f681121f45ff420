"""How a rank gets state that it lacks: from other ranks, from keepers, from storage.

Runs in a worker. Start reading at ``transfer.py``; ``background.py`` heals between steps,
``restore.py`` fetches experts without a live replica, ``repairing.py`` outvotes damaged replicas.
"""

"""How a rank gets state that it lacks: from other ranks, from keepers, or from storage.

Runs in a worker. Start reading at ``transfer.py``. ``background.py`` heals between steps,
``restore.py`` fetches experts that no rank holds, ``repairing.py`` repairs outvoted replicas.
"""

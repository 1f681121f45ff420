"""A node's keeper: a process that holds snapshots in host memory and writes them to storage.

The keeper is a process of its own, so that snapshots outlive the node's ranks, and imports no
torch. Start reading at ``process.py``. The node's ranks talk to the keeper through
``trainer_link.py``, other processes through ``client.py``.
"""

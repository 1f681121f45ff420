"""A node's keeper: it holds snapshots in host memory and writes them to storage; no torch.

A process of its own, so that snapshots outlive the trainer. Start reading at ``process.py``. Other
processes reach it through ``client.py``, its node's ranks through ``trainer_link.py``; nothing
else of this room is for them.
"""

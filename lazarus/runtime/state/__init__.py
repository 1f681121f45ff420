"""The trained state of one rank, addressed by names that are the same on every rank.

Runs in a worker. Start reading at ``replica.py``; the other modules are its parts: expert banks,
buffers, dense gradients, state as flat bytes, checksums and the comparison of replicas.
"""

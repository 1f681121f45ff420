"""Everything that one rank trains, addressed by global names.

Runs in a worker. Start reading at ``replica.py``; the other modules are its parts: banks, buffers,
dense gradients, bytes in one fixed order, checksums and comparison of replicas.
"""

"""Snapshots in host memory: a rank's copy of its state, and a node's shared memory."""

"""The exchange between CPU ranks of one machine: shared memory in place of a network.

For laptops and tests; ranks with a device of their own never use it. Start at ``shared.py``.
"""

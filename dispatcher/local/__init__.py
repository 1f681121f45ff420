"""The exchange between CPU ranks of one node, through shared memory instead of a network.

For laptops and tests: the exchange takes CPU tensors only. Start with ``shared.py``.
"""

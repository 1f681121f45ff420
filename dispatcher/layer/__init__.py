"""The way of one micro-batch through one MoE layer: there, through the experts, and back.

Start reading at ``dispatch.py``; ``path.py`` is the whole way as one autograd function.
"""

"""The forward and backward pass of one micro-batch through one MoE layer's experts.

Start with ``dispatch.py``; ``path.py`` is the complete pass as one autograd function.
"""

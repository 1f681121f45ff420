"""Model parts that a rank trains: router, expert bank, MoE layer, and a small GPT.

Start reading at ``moe.py``; ``context.py`` connects one layer with the run around it, and
``protocol.py`` says what a run needs of a layer of another kind.
"""

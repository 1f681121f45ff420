"""The model's parts that a rank trains: router, expert bank, MoE layer, and a small GPT.

Runs in the workers, on torch. Start reading at ``moe.py``; ``context.py`` is what a run tells one
layer and what the layer tells the run.
"""

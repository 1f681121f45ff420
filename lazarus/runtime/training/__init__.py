"""One optimizer step, and what lies between two of them: evaluation, comparison, hooks.

Runs in the training thread of a worker. Start reading at ``step.py``; ``world.py`` is the
generation that it computes in, ``factory.py`` what is made of the configuration and of the user's
code.
"""

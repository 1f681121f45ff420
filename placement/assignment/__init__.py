"""From a template and loads to a plan: which node holds which replica.

Start reading at ``select.py`` (which template) and ``build.py`` (the plan).
"""

"""Which experts a save takes, how often, and which rank writes what. PURE.

Start reading at ``schedule.py``; ``saving.py`` applies it to one rank's share.
"""

"""Which experts are saved at which step, and by which rank. PURE.

Start reading at ``schedule.py``; ``saving.py`` applies it to one rank's share.
"""

"""What a rank reads its samples through; runs in a worker.

Start reading at ``reader.py``. ``sources.py`` knows the three shapes of data, ``positions.py``
says where shards are, ``randomness.py`` seeds every generator by step and sample.
"""

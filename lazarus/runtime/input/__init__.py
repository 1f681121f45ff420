"""How a rank reads its samples; runs in a worker.

Start reading at ``reader.py``. ``sources.py`` reads the three kinds of data, ``positions.py``
encodes how far shards have been read, ``randomness.py`` seeds generators by step and sample.
"""

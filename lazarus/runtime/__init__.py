"""The processes of a run and all their effects; what is to be done is decided in ``control/``.

One room for each process: ``driver/``, ``controller/``, ``worker/``, ``keeper/``; ``launch/``
starts them. A worker's rooms are ``training/``, ``saving/``, ``healing/`` and ``input/``, on top
of ``state/`` (what a rank holds), ``comm/`` (what it computes through) and ``fence/`` (what may
stop it). ``spec.py`` is what the driver hands to each process. Imports go down only:
``tools/rooms.py`` prints them.
"""

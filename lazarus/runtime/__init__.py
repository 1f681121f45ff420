"""The processes of a run and their side effects. All decisions are made in ``lazarus.control``.

Each kind of process has a package: ``driver/``, ``controller/``, ``worker/``, ``keeper/``;
``launch/`` starts them. Worker code is split into ``training/``, ``saving/``, ``healing/`` and
``input/``, which build on ``state/`` (the tensors a rank holds), ``comm/`` (process groups and
collectives) and ``fence/`` (how a rank is stopped). ``spec.py`` holds what the driver passes to
each process. Packages only import packages below them; ``tools/rooms.py`` prints the order.
"""

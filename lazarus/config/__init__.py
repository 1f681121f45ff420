"""The configuration of a run: frozen sections, checked once, complete.

Read by the driver and handed to every process. Start reading at ``train_config.py``; each key with
its type, default and range is in ``sections.py``. ``layers.py`` merges files, environment and
``--set``, ``preflight.py`` says what cannot work before anything starts, ``changes.py`` what may
differ when a run is resumed, ``timeouts.py`` derives every time-out.
"""

"""The controller's part in checkpoints: completing them, and restoring from them.

Nothing is written here: workers and keepers write the files (``checkpoint/files/``), and the shell
the manifest. ``saves.py`` collects shares and orders manifests, ``adapting.py`` adapts the schedule
of saves to measured rates, ``losses.py`` chooses the copies from which lost experts are restored.
"""

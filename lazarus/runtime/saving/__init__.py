"""One rank's part in checkpoints; runs in a worker.

Start reading at ``saver.py``. ``final_checkpoint.py`` is the full one at the end of a run,
``rollback_state.py`` the dense state that a rollback stands on.
"""

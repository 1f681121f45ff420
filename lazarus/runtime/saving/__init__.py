"""One rank's part in checkpoints; runs in a worker.

Start reading at ``saver.py``. ``final_checkpoint.py`` writes the full checkpoint at the end of a
run, ``rollback_state.py`` reads the dense state for a rollback.
"""

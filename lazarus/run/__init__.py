"""Start and follow a run from the user's process, and return its result.

Everything here runs in the driver, which is the user's process. Start reading at ``trainer.py``:
``ElasticTrainer.fit`` checks the configuration, takes the run's folder (``run_place``), finds the
checkpoint to resume from (``resume_point``) and starts ``runtime/driver``. ``control_config``
derives the controller's settings from the configuration.
"""

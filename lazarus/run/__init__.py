"""A run as its user has it: configured, started, watched, and what it left.

Everything here runs in the driver, which is the user's process. Start reading at ``trainer.py``:
``ElasticTrainer.fit`` checks the configuration, takes the run's folder (``run_place``), finds
where to go on from (``resume_point``) and hands over to ``runtime/driver``. ``control_config`` is
the one place that tells the controller what the configuration says.
"""

"""The driver: the user's process, which starts and ends every other process of the run.

Start reading at ``driver.py``. ``orders.py`` says what each process is handed, ``nodes.py`` starts
nodes and replaces lost ones, ``controller_life.py`` and ``restarts.py`` restart the controller when
it dies, ``chaos.py`` injects random faults.
"""

"""Process groups that can be aborted from another thread, and a rank's collectives over them.

Runs in a worker; ranks find each other through ``controller/rendezvous.py``. Start reading at
``groups.py``; ``guarded_exchange.py`` checks the fence before each collective.
"""

"""Process groups that can be broken at once, and the exchange that a rank computes through.

Runs in a worker; ranks find each other through ``controller/rendezvous.py``. Start reading at
``groups.py``; ``guarded_exchange.py`` is fenced and observed.
"""

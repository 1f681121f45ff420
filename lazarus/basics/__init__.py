"""Small tools for every process, without imports from the rest of Lazarus.

Clocks, threads that report their errors, atomic files, safe reading of damaged files, formatting
of numbers, tracebacks of user code as text.
"""

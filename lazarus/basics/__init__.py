"""Small tools that import nothing of Lazarus; every process uses them.

Clocks, threads whose death is news, files that are there whole or not at all, careful reading of
damaged text, numbers as people read them, tracebacks of user code as text.
"""

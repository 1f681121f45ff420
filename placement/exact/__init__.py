"""Slower planners for planned moments: an integer program, and a bounded local search."""

"""Slower planners for use without time pressure: an integer program and a local search."""

"""Splits: how many of an expert's tokens each replica serves, computed identically on all ranks."""

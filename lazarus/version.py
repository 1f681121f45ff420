"""The version of Lazarus. All workers of a run must have the same version."""

__version__ = "0.1.0.dev0"

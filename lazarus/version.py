"""The version; workers of two versions in one run are refused."""

__version__ = "0.1.0.dev0"

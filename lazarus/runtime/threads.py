"""Threads whose death is news, for the processes of a run; see ``lazarus.threads``."""

from lazarus.threads import OnDeath, say_so, spawn

__all__ = ["OnDeath", "say_so", "spawn"]

"""Rebuilds the controller's state after a restart, from its journal or a folded state."""

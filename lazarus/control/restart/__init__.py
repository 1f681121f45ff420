"""The controller's state after its own death, from its journal or from a folded one."""

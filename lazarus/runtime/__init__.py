"""Part of Lazarus."""

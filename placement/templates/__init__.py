"""Templates: the core node sets that all layers share, their families and their node order."""

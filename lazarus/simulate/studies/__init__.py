"""Named experiments, their tables and findings, and cost models from records of real runs."""

"""Named experiments with tables and findings, and calibration from records of real runs."""

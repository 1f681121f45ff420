"""The format of checkpoints: experts' images, the manifest, and the lineage. PURE."""

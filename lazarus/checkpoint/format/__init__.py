"""What a checkpoint is made of: images of experts, manifest, which copies are true. PURE."""

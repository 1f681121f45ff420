"""Partial expert checkpoints: in host memory, on storage, and what is true of them."""

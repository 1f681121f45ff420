"""Requests for plans, with loads that follow a power law."""

from __future__ import annotations

import numpy as np

from placement import PlacementRequest


def zipf(layers: int, experts: int, power: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row = np.arange(1, experts + 1) ** -power
    return np.stack([rng.permutation(row) for _ in range(layers)]) * 1e4


def request(nodes: int = 10, slots: int = 6, **options: object) -> PlacementRequest:
    options.setdefault("load", zipf(4, 16, 1.2))
    return PlacementRequest(num_nodes=nodes, slots_per_node=slots, **options)  # type: ignore[arg-type]

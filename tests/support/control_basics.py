"""What a simulated cluster is made of: its size, digests, vectors, and a broken invariant."""

from __future__ import annotations

import hashlib

import numpy as np

from lazarus.control.messages import Vector
from lazarus.control.vector import VectorLayout, contribution

LAYERS, EXPERTS = 1, 4
Expert = tuple[int, int]


class Broken(AssertionError):
    """An invariant does not hold."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


def need(condition: object, rule: str, message: str) -> None:
    if not condition:
        raise Broken(rule, message)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def counts_of(step: int) -> np.ndarray:
    """Routed copies of a step, float64 [L, E]: a function of the step alone."""
    return np.array([[1.0 + (7 * step + 3 * e) % 5 for e in range(EXPERTS)]] * LAYERS)


def vector_of(*, seats: int, generation: int, step: int, pauses: int) -> Vector:
    """The summed vector that all ranks of a group get."""
    layout = VectorLayout(world_size=seats, num_layers=LAYERS, num_experts=EXPERTS)
    lanes = sum(
        contribution(
            layout,
            rank=rank,
            generation=generation,
            step=step,
            samples=2,
            count=8.0,
            sample_hash=step,
            loss_sum=1.0,
            aux_sum=0.0,
            found_inf=False,
            pause=rank < pauses,
            own_s=0.01,
        )
        for rank in range(seats)
    )
    lanes[layout.counts] = counts_of(step).reshape(-1)
    return Vector(generation=generation, step=step, lanes=lanes.astype("<f8").tobytes())

"""What users log in a step, behind the lanes of its commit vector.

The sums travel with the vector and are journaled with it, so a committed step has its metrics
whoever dies. Tail of a vector after its fixed lanes: M, then M pairs (weighted sum, weight), then
the names as bytes of UTF-8 text, one a line, padded to whole lanes. No names, no tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lazarus.control.vector import Lanes, VectorLayout
from lazarus.errors import BrokenInvariantError


def with_measures(lanes: Lanes, names: Sequence[str], sums: Lanes) -> Lanes:
    """A summed vector with the measures of its step.

    Args:
        lanes: The fixed lanes, summed over all ranks.
        names: Names in the order in which all ranks summed.
        sums: float64 [2 * len(names)], summed over all ranks.
    """
    if not names:
        return lanes
    text = "\n".join(names).encode()
    padded = np.frombuffer(text + b"\n" * (-len(text) % 8), dtype="<f8")
    return np.concatenate([lanes, [float(len(names))], sums, padded])


def measures_of(layout: VectorLayout, lanes: Lanes) -> Mapping[str, tuple[float, float]]:
    """Mean and weight of every name that was logged in the step.

    Raises:
        BrokenInvariantError: What follows the fixed lanes is not such a tail.
    """
    tail = lanes[layout.num_lanes :]
    if not tail.size:
        return {}
    count = int(tail[0])
    sums = tail[1 : 1 + 2 * count]
    names = tail[1 + 2 * count :].tobytes().decode().rstrip("\n").split("\n")
    if len(names) != count or sums.size != 2 * count:
        raise BrokenInvariantError(f"a vector names {len(names)} measures and sums {count}")
    return {
        name: (float(total / weight), float(weight))
        for name, total, weight in zip(names, sums[::2], sums[1::2], strict=True)
        if weight > 0
    }

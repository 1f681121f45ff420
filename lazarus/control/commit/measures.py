"""Metrics that users log in a step, stored behind the lanes of the step's commit vector.

The sums are journaled with the vector, so a committed step keeps its metrics whichever node is
lost. The tail of a vector after its fixed lanes is: the number M of names, M pairs (weighted sum,
weight), and the names as UTF-8 text, one per line, padded to whole lanes. Without names there is no
tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lazarus.control.vector import Lanes, VectorLayout
from lazarus.errors import BrokenInvariantError


def with_measures(lanes: Lanes, names: Sequence[str], sums: Lanes) -> Lanes:
    """Append the measures of a step to its summed vector.

    Args:
        lanes: The fixed lanes, summed over all ranks.
        names: Names, in the order of ``sums`` on all ranks.
        sums: float64 [2 * len(names)], summed over all ranks.
    """
    if not names:
        return lanes
    text = "\n".join(names).encode()
    padded = np.frombuffer(text + b"\n" * (-len(text) % 8), dtype="<f8")
    return np.concatenate([lanes, [float(len(names))], sums, padded])


def measures_of(layout: VectorLayout, lanes: Lanes) -> Mapping[str, tuple[float, float]]:
    """Mean and weight of every metric that was logged in the step, by name.

    Raises:
        BrokenInvariantError: The lanes behind the fixed ones are not a valid tail.
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

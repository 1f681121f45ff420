"""The greedy rule of replica allocation, slot by slot: slow and obvious, for comparison."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def allocate_by_heap(
    load: Sequence[float], *, num_slots: int, min_replicas: int, max_replicas: int
) -> tuple[int, ...]:
    """Replicas per expert of one layer: the next slot goes to the largest load / replicas.

    Ties go to the expert with fewer replicas, then to the lower id. Experts without load come
    last, and evenly.
    """
    least = min((w for w in load if w > 0), default=1.0)
    weights = [w if w > 0 else least / (2.0 * max_replicas) for w in load]
    replicas = [min_replicas] * len(weights)
    heap = [(-w / min_replicas, min_replicas, e) for e, w in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(min(num_slots, len(weights) * max_replicas) - sum(replicas)):
        while heap[0][1] >= max_replicas:
            heapq.heappop(heap)
        _, count, expert = heapq.heappop(heap)
        replicas[expert] = count + 1
        heapq.heappush(heap, (-weights[expert] / (count + 1), count + 1, expert))
    return tuple(replicas)

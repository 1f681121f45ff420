"""Messages of simulated workers, built from the state that real workers would have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.control.cluster.state import Control
from lazarus.control.messages import Aligned, Body, Held, Hello, SnapshotHeld, Vector
from lazarus.control.vector import VectorLayout
from lazarus.record.loads import Floats
from placement import Plan

VERSION = "simulated"


def hello(key: str) -> Hello:
    """Return the hello message of a node's only worker."""
    return Hello(worker=f"{key}.0", node_key=key, version=VERSION, host=key)


def vector(
    state: Control, *, step: int, tokens: float, wall_s: float, at_s: float, counts_LE: Floats
) -> Vector:
    """Return the commit vector of a step in the running generation."""
    layout = VectorLayout(
        world_size=len(state.standing.seats),
        num_layers=state.standing.shape[0],
        num_experts=state.standing.shape[1],
    )
    lanes = np.zeros(layout.num_lanes)
    world = len(state.standing.seats)
    lanes[:5] = (world, world * state.resumed, world * step, 1, tokens)
    lanes[layout.times] = wall_s
    lanes[layout.counts] = np.rint(counts_LE).reshape(-1)
    return Vector(
        generation=state.resumed, step=step, lanes=lanes.tobytes(), wall_s=wall_s, at_s=at_s
    )


def holdings(plan: Plan, seats: tuple[str, ...]) -> dict[str, tuple[Held, ...]]:
    """Return the experts that each rank holds under a plan, by worker."""
    rows_R = np.ascontiguousarray(plan.expert_of_slot.transpose(1, 0, 2))
    whole = np.dtype((np.void, rows_R[0].nbytes))  # a rank's slots of all layers as one key
    keys = rows_R.reshape(len(rows_R), -1).view(whole)[:, 0].tolist()
    known: dict[bytes, tuple[Held, ...]] = {}  # many ranks hold the same
    for rank, key in enumerate(keys):
        if key not in known:
            known[key] = tuple(
                Held(layer=layer, experts=tuple(e for e in slots if e >= 0))
                for layer, slots in enumerate(rows_R[rank].tolist())
            )
    return {worker: known[key] for worker, key in zip(seats, keys, strict=True)}


def all_aligned(
    workers: Sequence[str], *, held: Mapping[str, tuple[Held, ...]],
    snapshots: Mapping[str, tuple[SnapshotHeld, ...]], generation: int, step: int,
    history: NDArray[np.float64], dense_bytes: float, expert_bytes: float,
) -> dict[str, Body]:  # fmt: skip
    """Return each worker's ``Aligned`` message: at ``step``, with the experts it holds.

    Workers with equal holdings share one message object, for speed.
    """
    alike: dict[str, Any] = {
        "generation": generation,
        "step": step,
        "history": history.astype("<f8").tobytes(),
        "dense_bytes": int(dense_bytes),
        "expert_bytes": int(expert_bytes),
        "num_layers": history.shape[1],
        "num_experts": history.shape[2],
    }
    nothing: tuple[Held, ...] = ()
    mine = [held.get(worker, nothing) for worker in workers]
    said = {key: Aligned(held=each, **alike) for key, each in {id(m): m for m in mine}.items()}
    answers: dict[str, Body] = dict(zip(workers, map(said.__getitem__, map(id, mine)), strict=True))
    for worker in snapshots.keys() & answers.keys():
        rows = held.get(worker, nothing)
        answers[worker] = Aligned(held=rows, snapshots=snapshots[worker], **alike)
    return answers

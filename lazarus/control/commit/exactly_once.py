"""The samples of committed steps, for the ledger in the run's record (invariant I9)."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from lazarus.control.cluster.state import Control
from lazarus.control.messages import Vector
from lazarus.control.ports import Publish
from lazarus.control.vector import StepSums, sample_hash
from lazarus.data.sampler import step_sample_ids
from lazarus.data.stream import step_sample_numbers


def num_samples_in(scalars: str) -> int:
    """Size of the data, from the ``scalars`` of an aligned rank; see ``Standing.num_samples``."""
    data = json.loads(scalars or "{}").get("data") or {}
    return int(data.get("num_samples", 0))


def ids_of_step(step: int, *, seed: int, global_batch: int, num_samples: int) -> NDArray[np.int64]:
    """The sample ids of a step, int64 [global_batch].

    Without a size (``num_samples`` <= 0) samples are numbered consecutively from the first step.
    """
    if num_samples > 0:
        return step_sample_ids(seed, step, global_batch, num_samples)
    return step_sample_numbers(step, global_batch)


def ledger_event(state: Control, vector: Vector, sums: StepSums) -> Publish:
    """The event with a committed step's sample ids, or a mismatch if its vector has others."""
    config = state.config
    ids = ids_of_step(
        sums.step,
        seed=config.seed,
        global_batch=config.global_batch,
        num_samples=state.standing.num_samples,
    )
    fields = {"generation": vector.generation, "step": sums.step}
    wanted = (len(ids), sample_hash(ids, step=sums.step))
    if (sums.samples, sums.sample_hash) == wanted:
        return Publish(t=vector.at_s, event="ledger", fields={**fields, "sample_ids": ids.tolist()})
    odd = {"samples": sums.samples, "expected": wanted[0]}
    return Publish(t=vector.at_s, event="ledger_mismatch", fields={**fields, **odd})

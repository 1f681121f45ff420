"""Common state to roll back to: that of a checkpoint, or that of the first step.

It is read without changing the rank's own state and taken over all at once, so that a loss in
between leaves every rank unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.store import load_manifest
from lazarus.checkpoint.files.tensors import specs_of
from lazarus.checkpoint.format.manifest import LayerEntry
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.errors import CheckpointError
from lazarus.runtime.healing.restore import PatientReader
from lazarus.runtime.saving.final_checkpoint import layer_entry
from lazarus.runtime.state.flat_bytes import as_bytes
from lazarus.runtime.state.replica import Replica


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """State after ``step`` except the experts; ``history`` is float64 [3, layers, experts]."""

    step: int
    dense: Mapping[str, Tensor]
    history: NDArray[np.float64]
    scalars: str  # JSON, as ranks report it at ALIGN

    @classmethod
    def of(cls, replica: Replica, *, step: int, scalars: str) -> Base:
        """The state of a replica. Tensors are not copied."""
        dense = dict(replica.dense_tensors())
        return cls(step=step, dense=dense, history=replica.history, scalars=scalars)

    def dense_digest(self) -> str:
        """Fast checksum, which ranks compare before they take the state over."""
        digest = xxhash.xxh3_128()
        for name in sorted(self.dense):
            digest.update(as_bytes(self.dense[name].contiguous()).cpu().numpy().data)
        digest.update(self.scalars.encode())
        return digest.hexdigest()

    def history_digest(self) -> str:
        """Fast checksum of the load history."""
        return xxhash.xxh3_128_hexdigest(self.history.tobytes())


def read_base(ref: CheckpointRef, replica: Replica, *, read: PatientReader | None = None) -> Base:
    """Read the common state of a checkpoint.

    Args:
        ref: The checkpoint.
        replica: Gives the names and shapes that the checkpoint must have.
        read: Reads files; by default with one second of patience.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks a tensor of the right shape.
    """
    read = read or PatientReader(patience_s=1.0)
    manifest = read.ask(lambda: load_manifest(ref.url, ref.step), place=str(ref))
    reader = CheckpointReader(ref.url, manifest, read=read)
    entries = [layer_entry(replica, layer) for layer in range(len(replica.layers))]
    reader.require(
        dense=specs_of(dict(replica.dense_tensors())),
        layers=[LayerEntry.from_json(entry) for entry in entries],
    )
    dense = reader.dense()
    history = np.array(manifest.meta["history"], dtype=np.float64)
    if history.shape != replica.history.shape:
        raise CheckpointError(
            f"the checkpoint of step {ref.step} counts {history.shape[1:]} layers and experts, the "
            f"model has {replica.history.shape[1:]}"
        )
    scalars = str(manifest.meta["scalars"])
    json.loads(scalars)
    return Base(step=ref.step, dense=dense, history=history, scalars=scalars)

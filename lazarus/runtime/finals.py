"""A full checkpoint written by the ranks themselves, at the end of a run: each rank its share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lazarus.checkpoint.store import Record, RecordKey, Tag, write_files
from lazarus.checkpoint.tensors import record_of, specs_of
from lazarus.runtime.replica import Replica
from placement import Plan


def write_share(
    url: str,
    replica: Replica,
    plan: Plan,
    *,
    rank: int,
    size: int,
    tag: Tag,
    step: int,
    scalars: str,
) -> dict[str, Any]:
    """Write this rank's share: experts at home here, and every size-th dense tensor.

    Returns:
        JSON-able report for the manifest.
    """
    records = [_dense_record(replica, rank=rank, size=size, tag=tag, step=step)]
    for layer in range(len(replica.layers)):
        for expert in range(replica.num_experts):
            if plan.home[layer, expert] == rank:
                records.append(_expert_record(replica, layer, expert, tag=tag, step=step))
    # A name of its own: a partial checkpoint of the same step may be under way.
    own = replace(tag, job=f"{tag.job}-full")
    files = write_files(url, [record for record in records if record.specs], tag=own)
    report: dict[str, Any] = {"files": [file.to_json() for file in files]}
    if rank == 0:
        report |= {
            "layers": [layer_entry(replica, layer) for layer in range(len(replica.layers))],
            "dense_names": [name for name, _ in replica.dense_tensors()],
            "scalars": scalars,
            "history": replica.history.tolist(),
            "routed": replica.history[1].astype(int).tolist(),
        }
    return report


def _dense_record(replica: Replica, *, rank: int, size: int, tag: Tag, step: int) -> Record:
    tensors = replica.dense_tensors()[rank::size]
    key = RecordKey(layer=-1, expert=rank, step=step, generation=tag.generation)
    return record_of(key, dict(tensors), tag=tag)


def _expert_record(replica: Replica, layer: int, expert: int, *, tag: Tag, step: int) -> Record:
    key = RecordKey(
        layer=layer,
        expert=expert,
        step=step,
        generation=tag.generation,
        routed=int(replica.history[1, layer, expert]),
    )
    return record_of(key, dict(replica.expert_tensors(layer, expert)), tag=tag)


def layer_entry(replica: Replica, layer: int) -> dict[str, Any]:
    """What a manifest says of one MoE layer: path, experts, tensors of each."""
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    for name, tensor in replica.expert_names(layer):
        part = "weights" if name.startswith("model.") else "optimizer"
        parts[part][name] = tensor
    return {
        "path": replica.layer_names[layer],
        "num_experts": replica.num_experts,
        "tensors": {
            part: [spec.to_json() for spec in specs_of(tensors)] for part, tensors in parts.items()
        },
    }

"""What a checkpoint must have before a run stands on it: every tensor and every expert, by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lazarus.checkpoint.files.store import Tag, commit_manifest, write_files
from lazarus.checkpoint.format.manifest import LayerEntry, WrittenFile
from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.config.train_config import TrainConfig
from lazarus.errors import CheckpointError
from lazarus.runtime.saving.final_checkpoint import share_of, share_report
from lazarus.runtime.saving.rollback_state import Base, read_base
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from placement import PlacementRequest, plan

TAG = Tag(job="job", term=1, generation=1)


def replica_of(*, experts: int = 4, layers: int = 2, dim: int = 16, seed: int = 0) -> Replica:
    config = TrainConfig.load(
        overrides=[
            f"model.layers={layers}",
            f"model.dim={dim}",
            "model.heads=2",
            "model.seq_len=16",
            f"model.experts={experts}",
            "model.top_k=2",
            "model.moe_every=1",
        ]
    )
    replica = Replica(
        lambda: defaults.model(config),
        optimizer=defaults.optimizer(config),
        schedule=defaults.schedule(config),
        clip_norm=1.0,
        seed=seed,
        device=torch.device("cpu"),
        num_slots=experts,
    )
    for layer in range(layers):
        replica.place(layer, range(experts), {})
    return replica


def stored(url: str, replica: Replica, *, step: int = 7) -> None:
    """A full checkpoint by one rank."""
    load = np.ones((len(replica.layers), replica.num_experts))
    alone = plan(
        PlacementRequest(load=load, num_nodes=1, slots_per_node=replica.num_experts, min_replicas=1)
    )
    records = share_of(replica, alone, rank=0, size=1, tag=TAG, step=step)
    files = write_files(url, records, tag=TAG)
    share = share_report(replica, files, rank=0, scalars='{"optimizer": ""}')
    commit_manifest(
        url,
        [WrittenFile.from_json(item) for item in share["files"]],
        tag=TAG,
        step=step,
        layers=[LayerEntry.from_json(entry) for entry in share["layers"]],
        dense_names=share["dense_names"],
        lineage=[(1, 0)],
        meta={"scalars": share["scalars"], "history": share["history"]},
        previous=None,
    )


def test_what_was_written_is_read_and_nothing_is_touched_before_it_is_taken(tmp_path: Path) -> None:
    writer, reader = replica_of(seed=1), replica_of(seed=2)
    writer.history = writer.history + 3.0
    stored(str(tmp_path), writer)
    before = reader.dense_digest()
    base = read_base(CheckpointRef(str(tmp_path), 7), reader)
    assert reader.dense_digest() == before != writer.dense_digest()
    assert base.step == 7 and np.array_equal(base.history, writer.history)
    reader.load_dense(base.dense)
    own = {name: t.clone() for name, t in reader.dense_tensors()}
    for name, tensor in writer.dense_tensors():
        assert torch.equal(own[name], tensor), name


def test_two_readings_have_one_digest_and_another_state_has_another(tmp_path: Path) -> None:
    stored(str(tmp_path), replica_of(seed=1))
    place = CheckpointRef(str(tmp_path), 7)
    first, second = (read_base(place, replica_of(seed=s)) for s in (2, 3))
    assert first.dense_digest() == second.dense_digest()
    assert first.history_digest() == second.history_digest()
    fresh = Base.of(replica_of(seed=4), step=0, scalars="")
    assert fresh.dense_digest() != first.dense_digest()


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"experts": 5}, "L0/E4"),
        ({"dim": 32}, "32"),
        ({"layers": 3}, "3 MoE layers (it has 2)"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused_by_name(
    tmp_path: Path, shape: dict[str, int], named: str
) -> None:
    stored(str(tmp_path), replica_of())
    with pytest.raises(CheckpointError) as caught:
        read_base(CheckpointRef(str(tmp_path), 7), replica_of(**shape))
    assert named in str(caught.value)
    assert "step 7" in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    stored(str(tmp_path), replica_of())
    manifest = json.loads((tmp_path / "step-00000007" / "manifest.json").read_text())
    (dense,) = {entry["file"] for entry in manifest["dense"].values()}
    path = tmp_path / dense
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        read_base(CheckpointRef(str(tmp_path), 7), replica_of())

"""A toy state with experts and dense tensors, for tests and benchmarks of this package."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lazarus.checkpoint.files.storage import Probe, no_probe
from lazarus.checkpoint.files.store import Record, RecordKey, Tag, commit_manifest, write_files
from lazarus.checkpoint.files.tensors import record_of, specs_of
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.manifest import OPTIMIZER, WEIGHTS, LayerEntry, Manifest

TAG = Tag(job="toy", term=1, generation=1)


@dataclass
class ToyState:
    """A model state in which every tensor is a function of (seed, step, name)."""

    num_layers: int = 2
    num_experts: int = 4
    dim: int = 8
    seed: int = 0
    routed_per_step: int = 10
    extra_dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def _tensor(self, name: str, shape: tuple[int, ...], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash_of(f"{self.seed}/{step}/{name}"))
        return torch.randn(shape, generator=generator)

    def dense(self, step: int) -> dict[str, Tensor]:
        """Dense weights, a router bias, and their optimizer state, by global name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (16, self.dim)}
        shapes["model.norm.weight"] = (self.dim,)
        for layer in range(self.num_layers):
            shapes[f"model.blocks.{layer}.moe.router_bias"] = (self.num_experts,)
        shapes |= self.extra_dense
        shapes |= {f"optimizer.exp_avg.{n[6:]}": s for n, s in shapes.items() if "bias" not in n}
        return {name: self._tensor(name, shape, step) for name, shape in shapes.items()}

    def expert(self, layer: int, expert: int, step: int) -> dict[str, Tensor]:
        """One expert's weights and moments by global name."""
        path = f"blocks.{layer}.moe.experts.{expert}"
        names = [f"model.{path}.w", f"optimizer.exp_avg.{path}.w", f"optimizer.exp_avg_sq.{path}.w"]
        return {name: self._tensor(name, (self.dim, 2 * self.dim), step) for name in names}

    def layers(self) -> tuple[LayerEntry, ...]:
        """The manifest's description of the MoE layers."""
        shape = (self.dim, 2 * self.dim)

        def spec(prefix: str, layer: int) -> TensorSpec:
            name = f"{prefix}blocks.{layer}.moe.experts.{{e}}.w"
            return TensorSpec(name=name, dtype="F32", shape=shape)

        return tuple(
            LayerEntry(
                path=f"blocks.{layer}.moe",
                num_experts=self.num_experts,
                tensors={
                    WEIGHTS: (spec("model.", layer),),
                    OPTIMIZER: (
                        spec("optimizer.exp_avg.", layer),
                        spec("optimizer.exp_avg_sq.", layer),
                    ),
                },
            )
            for layer in range(self.num_layers)
        )

    def all_experts(self) -> list[tuple[int, int]]:
        """Every (layer, expert)."""
        return [(x, e) for x in range(self.num_layers) for e in range(self.num_experts)]

    def records(
        self, step: int, experts: Iterable[tuple[int, int]], *, tag: Tag = TAG
    ) -> list[Record]:
        """One dense shard and the given experts, ready to be written."""
        dense_key = RecordKey(layer=-1, expert=0, step=step, generation=tag.generation)
        records = [record_of(dense_key, self.dense(step), tag=tag)]
        for layer, expert in experts:
            key = RecordKey(
                layer=layer,
                expert=expert,
                step=step,
                generation=tag.generation,
                routed=step * self.routed_per_step,
            )
            records.append(record_of(key, self.expert(layer, expert, step), tag=tag))
        return records

    def dense_specs(self) -> tuple[TensorSpec, ...]:
        """Every dense tensor's name, dtype and shape."""
        return specs_of(self.dense(0))

    def save(
        self,
        url: str,
        step: int,
        *,
        experts: Sequence[tuple[int, int]] | None = None,
        previous: Manifest | None = None,
        tag: Tag = TAG,
        lineage: Sequence[tuple[int, int]] = ((1, 0),),
        lives: Collection[str] | None = None,
        probe: Probe = no_probe,
    ) -> Manifest:
        """Write and commit one checkpoint of the given experts (all by default)."""
        chosen = self.all_experts() if experts is None else experts
        written = write_files(url, self.records(step, chosen, tag=tag), tag=tag, probe=probe)
        return commit_manifest(
            url,
            written,
            tag=tag,
            step=step,
            layers=self.layers(),
            dense_names=[s.name for s in self.dense_specs()],
            lineage=lineage,
            meta={"config_digest": "toy", "seed": self.seed},
            previous=previous,
            lives=lives,
            probe=probe,
        )


def hash_of(text: str) -> int:
    """A seed computed from text; the same in every process, unlike ``hash``."""
    value = 0
    for char in text.encode():
        value = (value * 131 + char) % (1 << 61)
    return value

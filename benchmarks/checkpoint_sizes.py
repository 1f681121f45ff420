"""How large are partial checkpoints, and who is the bottleneck? Paper's accounting and ours.

    python benchmarks/checkpoint_sizes.py [--quick] [--json FILE] [--write DIR]

Paper's accounting: 14 bytes a parameter (2 fp16 weight, 4 fp32 master, 8 Adam moments), of which
10 are partial: the master weights of all experts are saved every time (papers.md 2.6). Ours: 12
bytes (fp32 weight, 8 Adam), all of them partial. "Written" are the bytes of real files and
manifests: at the real shape with --write DIR, else at 1/8 of the width; the predicted bytes of
the real shape are exact (they come from the same layout), which the written ones check.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lazarus.checkpoint.files.store import Record, RecordKey, Tag, commit_manifest, write_files
from lazarus.checkpoint.format.image import TensorSpec, layout_image
from lazarus.checkpoint.format.manifest import OPTIMIZER, WEIGHTS, LayerEntry, Manifest
from lazarus.checkpoint.selection.sharding import (
    Unit,
    WorkSplit,
    split_adaptively,
    split_equally,
    split_unsharded,
)

_WRITE_LIMIT = 10e9  # bytes; larger shapes are written at 1/8 of their width all the same
TAG = Tag(job="sizes", term=1, generation=1)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT with experts in every ``moe_every``-th block."""

    name: str
    layers: int
    dim: int
    experts: int
    moe_every: int
    vocab: int = 50304
    seq_len: int = 2048

    @property
    def moe_layers(self) -> int:
        """Blocks with experts."""
        return self.layers // self.moe_every

    def expert(self) -> dict[str, tuple[int, ...]]:
        """Fields of one expert."""
        d = self.dim
        return {"w_in": (d, 4 * d), "b_in": (4 * d,), "w_out": (4 * d, d), "b_out": (d,)}

    def dense(self) -> dict[str, tuple[int, ...]]:
        """Every dense parameter."""
        d = self.dim
        found: dict[str, tuple[int, ...]] = {
            "embed": (self.vocab, d),
            "positions": (self.seq_len, d),
        }
        for i in range(self.layers):
            found |= {f"{i}.attn.w": (d, 4 * d), f"{i}.attn.b": (4 * d,), f"{i}.norms": (4 * d,)}
            if (i + 1) % self.moe_every:
                found |= {f"{i}.ffn.{n}": s for n, s in self.expert().items()}
            else:
                found[f"{i}.router"] = (self.experts, d)
        return found | {"norm": (2 * d,)}

    def scaled(self, factor: int) -> Shape:
        """The same with width, vocabulary and length divided."""
        return Shape(
            name=f"{self.name} / {factor}",
            layers=self.layers,
            dim=self.dim // factor,
            experts=self.experts,
            moe_every=self.moe_every,
            vocab=self.vocab // factor,
            seq_len=self.seq_len // factor,
        )


# Source: the papers' model table; v1's 8-expert GPT has experts in all 12 layers (papers.md 2.6).
SHAPES = (
    (Shape(name="GPT-125M-8E", layers=12, dim=768, experts=8, moe_every=1), 54.2),
    (Shape(name="GPT-350M-16E", layers=24, dim=1024, experts=16, moe_every=2), 57.7),
)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers in a set of tensors."""
    return sum(TensorSpec(name=n, dtype="U8", shape=s).num_bytes for n, s in shapes.items())


def paper_smaller(shape: Shape, k: int) -> float:
    """Percent that a K-expert checkpoint is smaller than a full one, by the paper's accounting."""
    experts = count(shape.expert()) * shape.experts * shape.moe_layers
    total = experts + count(shape.dense())
    return 100 * (1 - k / shape.experts) * experts / total * 10 / 14


def with_moments(names: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    """fp32 weights and both Adam moments."""
    return tuple(
        TensorSpec(name=f"{prefix}{n}", dtype="F32", shape=s)
        for prefix in ("model.", *(f"optimizer.{m}." for m in MOMENTS))
        for n, s in names.items()
    )


def expert_specs(shape: Shape, layer: int, expert: int | str) -> tuple[TensorSpec, ...]:
    """One expert's record."""
    path = f"blocks.{layer}.moe.experts.{expert}."
    return with_moments({path + n: s for n, s in shape.expert().items()})


def record(key: RecordKey, specs: tuple[TensorSpec, ...], zeros: memoryview) -> Record:
    """A record of zeros: sizes do not depend on values."""
    layout = key.layout(specs, TAG)
    body = layout.num_bytes - len(layout.header)
    blocks = [zeros] * (body // len(zeros)) + [zeros[: body % len(zeros)]]
    return Record(key=key, specs=layout.specs, chunks=[layout.header, *blocks])


def layer_entries(shape: Shape) -> tuple[LayerEntry, ...]:
    """The manifest's description of the experts."""
    entries = []
    for layer in range(shape.moe_layers):
        specs = expert_specs(shape, layer, "{e}")
        parts = {
            WEIGHTS: tuple(s for s in specs if s.name.startswith("model.")),
            OPTIMIZER: tuple(s for s in specs if not s.name.startswith("model.")),
        }
        path = f"blocks.{layer}.moe"
        entries.append(LayerEntry(path=path, num_experts=shape.experts, tensors=parts))
    return tuple(entries)


def write(shape: Shape, url: str, *, step: int, k: int, previous: Manifest | None) -> Manifest:
    """Really write a checkpoint of K experts per layer."""
    zeros = memoryview(bytes(8 << 20))
    dense = with_moments(shape.dense())
    key = RecordKey(layer=-1, expert=0, step=step, generation=1)

    def records() -> Any:
        yield record(key, dense, zeros)
        for layer in range(shape.moe_layers):
            for i in range(k):
                expert = RecordKey(
                    layer=layer, expert=(layer + i) % shape.experts, step=step, generation=1
                )
                yield record(expert, expert_specs(shape, layer, expert.expert), zeros)

    return commit_manifest(
        url,
        write_files(url, records(), tag=TAG),
        tag=TAG,
        step=step,
        layers=layer_entries(shape),
        dense_names=[s.name for s in dense],
        lineage=[(1, 0)],
        meta={},
        previous=previous,
    )


def predicted(shape: Shape, k: int) -> int:
    """Exact bytes of the files of a checkpoint of K experts per layer, without the manifest."""
    key = RecordKey(layer=-1, expert=0, step=200, generation=1)
    total = key.layout(with_moments(shape.dense()), TAG).num_bytes
    for layer in range(shape.moe_layers):
        for i in range(k):
            expert = RecordKey(
                layer=layer, expert=(layer + i) % shape.experts, step=200, generation=1
            )
            total += expert.layout(expert_specs(shape, layer, expert.expert), TAG).num_bytes
    return total


def sizes(shape: Shape, printed: float, folder: str | None) -> dict[str, Any]:
    """Paper's figure, ours predicted, ours written."""
    full, one = predicted(shape, shape.experts), predicted(shape, 1)
    small = shape if folder and full <= _WRITE_LIMIT else shape.scaled(8)
    with tempfile.TemporaryDirectory(dir=folder) as url:
        start = time.monotonic()
        first = write(small, url, step=100, k=shape.experts, previous=None)
        wall_s = time.monotonic() - start
        second = write(small, url, step=200, k=1, previous=first)
        on_disk = {
            step: sum(f.stat().st_size for f in Path(url, f"step-{step:08d}").iterdir())
            for step in (100, 200)
        }
    assert second.own_bytes() == predicted(small, 1), "the prediction must be exact"
    return {
        "shape": shape.name,
        "parameters": count(shape.dense())
        + count(shape.expert()) * shape.experts * shape.moe_layers,
        "paper_printed_percent_smaller": printed,
        "paper_accounting_percent_smaller": paper_smaller(shape, 1),
        "ours_percent_smaller": 100 * (1 - one / full),
        "ours_full_bytes": full,
        "ours_k1_bytes": one,
        "written_shape": small.name,
        "written_full_bytes": on_disk[100],
        "written_k1_bytes": on_disk[200],
        "written_percent_smaller": 100 * (1 - on_disk[200] / on_disk[100]),
        "manifest_bytes": on_disk[200] - second.own_bytes(),
        "full_write_gb_per_s": on_disk[100] / wall_s / 1e9,
    }


CASES = (  # name, ranks, experts per rank; source: the paper's cases for GPT-350M-16E
    ("case 1: DP8 EP8", 8, 2),
    ("case 2: DP16 EP16", 16, 1),
    ("case 3: DP16 EP8", 16, 2),
)


def units_of(shape: Shape, *, k: int, ranks: int, per_rank: int, first: int) -> list[Unit]:
    """Work of one checkpoint with expert parallelism: each tensor or expert and who holds it."""
    group = shape.experts // per_rank
    everyone = tuple(range(ranks))
    units = [
        Unit(key=(0, i), num_bytes=layout_image([spec], metadata={}).num_bytes, holders=everyone)
        for i, spec in enumerate(with_moments(shape.dense()))
    ]
    record_bytes = 12 * count(shape.expert())
    for layer in range(shape.moe_layers):
        for i in range(k):
            expert = (first * k + layer + i) % shape.experts
            holders = tuple(range(expert // per_rank, ranks, group))
            units.append(Unit(key=(1, layer, expert), num_bytes=record_bytes, holders=holders))
    return units


def bottlenecks(shape: Shape, k: int) -> list[dict[str, Any]]:
    """Bytes of the busiest rank, mean over one rotation of the selection."""
    rows = []
    splits = {"rank 0": split_unsharded, "equal": split_equally, "adaptive": split_adaptively}
    for name, ranks, per_rank in CASES:
        row: dict[str, Any] = {"shape": shape.name, "case": name, "k": k}
        rotations = range(-(-shape.experts // k))
        for label, split in splits.items():
            found: list[WorkSplit] = [
                split(
                    units_of(shape, k=k, ranks=ranks, per_rank=per_rank, first=n), num_ranks=ranks
                )
                for n in rotations
            ]
            row[label] = sum(w.bottleneck() for w in found) / len(found)
            row["ideal"] = sum(sum(w.bytes_of_ranks()) for w in found) / len(found) / ranks
        rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    """Print the report."""
    for row in report["sizes"]:
        print(
            f"{row['shape']:13s} {row['parameters'] / 1e6:7.1f}M  K=1 smaller by:"
            f"  paper printed {row['paper_printed_percent_smaller']:.1f} %"
            f"  its accounting {row['paper_accounting_percent_smaller']:.1f} %"
            f"  ours {row['ours_percent_smaller']:.1f} %"
            f" ({row['ours_full_bytes'] / 1e9:.2f} -> {row['ours_k1_bytes'] / 1e9:.2f} GB)"
            f"  written at {row['written_shape']}: {row['written_percent_smaller']:.1f} %"
            f" ({row['written_full_bytes'] / 1e6:.1f} -> {row['written_k1_bytes'] / 1e6:.1f} MB,"
            f" manifest {row['manifest_bytes'] / 1e3:.0f} kB,"
            f" {row['full_write_gb_per_s']:.2f} GB/s)"
        )
    print("\nbusiest rank, MB (mean over one rotation)        rank 0     equal  adaptive     ideal")
    for row in report["bottlenecks"]:
        k = "full" if row["k"] == report["experts"][row["shape"]] else f"K={row['k']}"
        cells = "".join(f"{row[s] / 1e6:10.1f}" for s in ("rank 0", "equal", "adaptive", "ideal"))
        gain = 100 * (1 - row["equal"] / row["rank 0"])
        more = 100 * (1 - row["adaptive"] / row["equal"])
        print(f"{row['shape']:13s} {row['case']:20s} {k:5s} {cells}  -{gain:.1f} %, -{more:.1f} %")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same; it is quick already")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--write", metavar="DIR", help="really write the real shapes below DIR")
    args = parser.parse_args()
    shapes = [shape for shape, _ in SHAPES]
    report = {
        "shapes": [asdict(shape) for shape in shapes],
        "experts": {shape.name: shape.experts for shape in shapes},
        "sizes": [sizes(shape, printed, args.write) for shape, printed in SHAPES],
        "bottlenecks": [row for k in (1, 4, 16) for row in bottlenecks(shapes[1], k)],
    }
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

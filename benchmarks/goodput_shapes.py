"""What goodput_under_faults.py trains, and the proportions of the Lazarus paper's testbed.

A fault every 20 s on one machine tells something of a fault every 300 s on a cluster only if the
other times shrink with it: the steps between checkpoints, and how long a checkpoint takes to
write and to read. The paper's side of it is estimated here from what it prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """The paper's run of one model: ten GPUs, checkpoints on NFS over 10 Gb/s, FP16 and Adam.

    ``restart_s`` is what DS(FT) lost by restarting GPT-L: 27 % of 30 min with five failures. For a
    system that ends its processes too that is a lower bound.
    """

    parameters: float
    dim: int
    step_s: float  # 1,800 s / steps that Lazarus finished in them
    layers: int = 12
    vocab: int = 50257
    seq_len: int = 1024
    period_s: float = 300.0
    every: int = 50  # steps between checkpoints of DS; DS(FT) five times as many
    bytes_per_parameter: int = 14
    storage_bytes_per_s: float = 1.25e9
    restart_s: float = 0.27 * 1800 / 5

    @property
    def write_s(self) -> float:
        """One full checkpoint at the storage's full rate; reading it takes as long."""
        return self.parameters * self.bytes_per_parameter / self.storage_bytes_per_s

    @property
    def expert_part(self) -> float:
        """Of a token's multiplications in a layer: experts; projections, attention, the logits."""
        experts = 8 * self.dim**2
        attention = 4 * self.dim**2 + 2 * self.seq_len * self.dim
        return experts / (experts + attention + self.vocab * self.dim / self.layers)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch small enough for six ranks on two cores; every block has experts.

    ``experts`` decides how many nodes fixed expert parallelism can use: of 6, 5, 4 and 3 nodes
    6, 4, 4, 3 with 12 experts (on average 95 %; GPT-S on 10 to 5 nodes with groups of two: 93 %)
    and 4, 4, 4, 2 with 16 (78 %; GPT-L with groups of four: 79 %).
    """

    name: str
    experts: int
    testbed: Testbed
    layers: int = 2
    dim: int = 64
    heads: int = 4
    vocab: int = 256
    seq_len: int = 32
    top_k: int = 1
    ffn_mult: int = 4
    moe_every: int = 1
    batch: int = 24
    micro_batch: int = 8

    def usable(self, live: int) -> int:
        """Nodes that fixed expert parallelism can use: the most that divide the experts."""
        return max(n for n in range(1, live + 1) if self.experts % n == 0)

    @property
    def rows(self) -> int:
        """Rows that one sample's tokens make, over all layers."""
        return self.seq_len * self.top_k * (self.layers // self.moe_every)

    def overrides(self) -> list[str]:
        """The same as keys of a configuration."""
        names = ("layers", "dim", "heads", "vocab", "seq_len", "experts", "top_k", "ffn_mult",
                 "moe_every")  # fmt: skip
        model = [f"model.{name}={getattr(self, name)}" for name in names]
        batch = [f"train.global_batch={self.batch}", f"train.micro_batch_size={self.micro_batch}"]
        return [*model, *batch]


GPT_S = Testbed(parameters=521e6, dim=768, step_s=1800 / 2926)
GPT_L = Testbed(parameters=1.7e9, dim=1024, step_s=1800 / 1996)
SHAPES = {
    "s": Shape(name="s", experts=12, testbed=GPT_S),
    "l": Shape(name="l", experts=16, testbed=GPT_L),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is modelled, and how often the baselines save; 0 s: not modelled."""

    device_s: float  # a rank's device needs so long per sample
    expert_part: float  # of it, see ``goodput_modelled.Device``
    write_s: float  # storage needs so long for a full checkpoint, either way
    every_b: int
    every_c: int


def timing(
    shape: Shape, *, period_s: float, nodes: int, device_ms: float, write_s: float | None = None
) -> Timing:
    """The testbed's times in proportion to the fault period.

    Args:
        write_s: Instead of the testbed's proportion.
    """
    bed = shape.testbed
    scale = period_s / bed.period_s

    def every(steps: int, on: int) -> int:
        if not device_ms:
            return steps
        step_s = math.ceil(shape.batch / on) * device_ms / 1000
        return max(1, round(steps * bed.step_s * scale / step_s))

    return Timing(
        device_s=device_ms / 1000,
        expert_part=bed.expert_part,
        write_s=bed.write_s * scale if write_s is None else write_s,
        every_b=every(bed.every, shape.usable(nodes)),
        every_c=every(5 * bed.every, nodes),
    )


def best_every(*, save_s: float, period_s: float, step_s: float) -> int:
    """Steps between checkpoints that cost least.

    Source: Young's first-order optimum, sqrt(2 x cost of a checkpoint x time between failures).
    """
    return max(1, round(math.sqrt(2 * save_s * period_s) / step_s))


@dataclass(frozen=True, kw_only=True)
class Proportions:
    """How a run's times relate to the time between faults."""

    steps_per_period: float
    save_interval: float  # of the period
    save: float
    restart: float

    def text(self) -> str:
        """One line."""
        return (
            f"{self.steps_per_period:5.0f} steps in a period; of the period: between saves "
            f"{self.save_interval:6.1%}, a save {self.save:5.1%}, a restart {self.restart:6.1%}"
        )


def proportions(
    *, period_s: float, step_s: float, every: int, save_s: float, restart_s: float
) -> Proportions:
    """The same four numbers for the paper's testbed and for a run."""
    return Proportions(
        steps_per_period=period_s / step_s,
        save_interval=every * step_s / period_s,
        save=save_s / period_s,
        restart=restart_s / period_s,
    )


def of_testbed(bed: Testbed) -> Proportions:
    """The paper's."""
    return proportions(
        period_s=bed.period_s, step_s=bed.step_s, every=bed.every, save_s=bed.write_s,
        restart_s=bed.restart_s,
    )  # fmt: skip

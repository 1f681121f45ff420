"""Settings and results of simulated runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from lazarus.checkpoint.restoring.policy import RecoveryDecider
from lazarus.control.cluster.state import ControlConfig
from lazarus.record.loads import LoadTrace
from lazarus.simulate.inputs.costs import Costs
from lazarus.simulate.inputs.faults import FaultSource, node_hours
from lazarus.simulate.inputs.shapes import Shape
from lazarus.simulate.past import Stretch
from lazarus.version import __version__
from placement import PlacementPolicy, replan


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One scenario: model, fleet, duration and faults.

    Attributes:
        tokens_per_step: Tokens of the global batch.
        horizon_s: Length of the simulated run, in virtual seconds.
        checkpoint_every: Steps between checkpoints on storage, for policies with replicas.
        full_checkpoint_every: Steps between full checkpoints of the policy ``ds``.
        ft_checkpoint_every: Steps between full checkpoints of the policy ``ds-ft``.
        group: Nodes that together hold every expert once, for fixed expert parallelism.
        placed_layers: MoE layers that are planned in detail; the other layers count as alike.
            None: all layers. Set a small number to simulate a deep model quickly.
        peer_batch_per_node: Whether fixed expert parallelism keeps the batch of a node constant,
            so that the global batch shrinks with the fleet.
        loads_step: Step of the load trace at which the run starts.
    """

    name: str
    shape: Shape
    costs: Costs
    load: LoadTrace
    faults: FaultSource
    num_nodes: int
    slots_per_node: int
    horizon_s: float
    tokens_per_step: float
    group: int = 4
    min_replicas: int = 2
    k_persist: int = 0  # 0: one in eight experts, at least one
    checkpoint_every: int = 250
    full_checkpoint_every: int = 50
    ft_checkpoint_every: int = 250
    join_debounce_s: float = 2.0
    peer_join_wait_s: float = 120.0
    peer_batch_per_node: bool = False
    placed_layers: int | None = None
    loads_step: int = 0
    steps: int = 0  # stop after so many; 0: at the horizon

    def digest(self) -> str:
        """Return a SHA-256 of all inputs of a result except policy and seed."""
        content = {
            **{k: v for k, v in vars(self).items() if isinstance(v, str | int | float | None)},
            "shape": self.shape.to_dict(),
            "costs": json.loads(self.costs.to_json()),
            "faults": repr(self.faults),
            "load": hashlib.sha256(self.load.counts.tobytes()).hexdigest(),
        }
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FleetPolicy:
    """A policy of the Lazarus controller: the same placement and recovery as in a live run."""

    name: str
    placement: PlacementPolicy = replan
    recovery: RecoveryDecider | None = None  # None: restore each lost expert from its newest copy
    min_replicas: int | None = None  # None: that of the setting
    slots_per_node: int | None = None
    overrides: Mapping[str, float] | None = None  # costs under this policy


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one simulated run: one setting, one policy, one seed. Plain values only."""

    scenario: str
    policy: str
    seed: int
    steps: int
    tokens: float
    wall_s: float
    goodput_tokens_per_s: float
    ettr: float
    plt: float
    steps_lost: int
    losses: int
    joins: int
    recoveries: int
    recovery_median_s: float
    recovery_worst_s: float
    stall_s: Mapping[str, float]
    restarts: int
    experts_moved: int
    experts_restored: int
    bytes_moved: float
    nodes_at_end: int
    step_s_at_start: float
    config_digest: str
    num_nodes: int  # at the start
    slots_per_node: int  # of one layer; 0 under fixed expert parallelism
    min_replicas: int
    state_bytes_per_node: float  # weights, master weights and moments
    node_hours: float  # presence summed over all nodes
    version: str = __version__
    decided_by: str = "lazarus.control"
    profile: str = ""  # name of the cost model
    recovery_s: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a JSON-serializable dictionary."""
        return asdict(self)


@dataclass
class Tally:
    """Running totals of a simulated run."""

    steps: int = 0
    tokens: float = 0.0
    steps_lost: int = 0
    productive_s: float = 0.0
    losses: int = 0
    joins: int = 0
    restarts: int = 0
    experts_moved: int = 0
    experts_restored: int = 0
    bytes_moved: float = 0.0
    lost_copies: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    stall_s: dict[str, float] = field(default_factory=dict)

    def stall(self, name: str, seconds: float) -> None:
        self.stall_s[name] = self.stall_s.get(name, 0.0) + seconds

    def undo(self, stretches: Sequence[Stretch]) -> None:
        """Subtract committed steps that a rollback undid, and count them as lost."""
        for stretch in stretches:
            lost = stretch.last - stretch.first
            self.steps -= lost
            self.steps_lost += lost
            self.tokens -= lost * stretch.tokens
            self.productive_s -= lost * stretch.step_s
            self.stall("lost steps", lost * stretch.step_s)

    def row(
        self, setting: Setting, *, policy: str, seed: int, wall_s: float, nodes: int,
        first_step_s: float, decided_by: str, config: ControlConfig | None = None,
    ) -> Row:  # fmt: skip
        """Return the totals as a row; ``config`` is None for fixed expert parallelism."""
        shape = setting.shape
        slots, floor = (config.slots_per_node or 0, config.min_replicas) if config else (0, 0)
        held = slots or -(-shape.experts // setting.group)
        tokens = self.tokens
        waits = sorted(self.recovery_s)
        copies = tokens * setting.shape.top_k * setting.shape.moe_layers
        return Row(
            scenario=setting.name,
            policy=policy,
            seed=seed,
            steps=self.steps,
            tokens=tokens,
            wall_s=wall_s,
            goodput_tokens_per_s=tokens / wall_s if wall_s > 0 else 0.0,
            ettr=min(1.0, self.productive_s / wall_s) if wall_s > 0 else 0.0,
            plt=self.lost_copies / copies if copies else 0.0,
            steps_lost=self.steps_lost,
            losses=self.losses,
            joins=self.joins,
            recoveries=len(waits),
            recovery_median_s=median(waits) if waits else 0.0,
            recovery_worst_s=waits[-1] if waits else 0.0,
            stall_s={k: round(v, 6) for k, v in sorted(self.stall_s.items())},
            restarts=self.restarts,
            experts_moved=self.experts_moved,
            experts_restored=self.experts_restored,
            bytes_moved=self.bytes_moved,
            nodes_at_end=nodes,
            step_s_at_start=first_step_s,
            config_digest=setting.digest(),
            num_nodes=setting.num_nodes,
            slots_per_node=slots,
            min_replicas=floor,
            state_bytes_per_node=held * shape.moe_layers * shape.expert_bytes + shape.dense_bytes,
            node_hours=node_hours(
                setting.faults, num_nodes=setting.num_nodes, length_s=wall_s, seed=seed
            ),
            decided_by=decided_by,
            profile=setting.costs.name,
            recovery_s=tuple(waits),
        )

"""The cost model: durations in seconds from named figures, each with its unit and reason.

Symbols: N nodes in use, E experts, L MoE layers of the model (a plan may hold only some of them
if layers are alike).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lazarus.basics.careful import parse_object, read_text
from lazarus.errors import ConfigError
from lazarus.record.loads import Floats
from lazarus.simulate.inputs.shapes import Shape
from placement import Plan

# Figures of the duration of a change of nodes, except for transferred bytes.
_CHANGES = (
    "detect_s", "release_s", "release_per_node_s", "align_s", "align_per_node_s", "groups_s",
    "groups_per_node_s", "plan_s", "transfer_fixed_s", "warmup_s", "warmup_per_node_s",
)  # fmt: skip


def _assume(default: Any, unit: str, why: str) -> Any:
    return field(default=default, metadata={"unit": unit, "why": why})


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """A cost model. Rates are per node, except that all nodes share the storage.

    ``lazarus calibrate`` measures these figures from records of real runs.
    """

    name: str = "h200-8x400g"
    source: str = "assumed"  # or "measured": calibrated from records
    flops_per_s: float = _assume(8 * 989e12 * 0.30, "FLOP/s", "8 GPUs at 30 % of their bf16 peak")
    net_bytes_per_s: float = _assume(8 * 50e9 * 0.8, "B/s", "8 x 400 Gbps at 80 %, each direction")
    storage_bytes_per_s: float = _assume(100e9, "B/s", "shared storage of the whole cluster")
    memory_bytes_per_s: float = _assume(8 * 3.5e12, "B/s", "device memory, for the optimizer")
    latency_s: float = _assume(3e-5, "s", "one collective among few nodes")
    latency_per_node_s: float = _assume(1e-6, "s", "added to a collective by each node")
    wire_bytes: float = _assume(2.0, "B", "one number of an activation or gradient on the wire")
    step_fixed_s: float = _assume(0.02, "s", "launch, data, commit barrier of a step")
    detect_s: float = _assume(0.1, "s", "process death to the controller's notice (closed stream)")
    release_s: float = _assume(0.5, "s", "survivors leave their collectives (communicator abort)")
    release_per_node_s: float = _assume(0.0, "s", "the same, added by each node")
    align_s: float = _assume(0.05, "s", "verdict and digest of the dense state")
    align_per_node_s: float = _assume(0.0, "s", "the same, added by each node")
    groups_s: float = _assume(2.0, "s", "new communicators")
    groups_per_node_s: float = _assume(0.005, "s", "the same, added by each node")
    plan_s: float = _assume(0.004, "s", "a plan, fixed part")
    plan_per_cell_s: float = _assume(3.3e-8, "s", "a plan, for each layer x expert x node")
    transfer_fixed_s: float = _assume(0.2, "s", "start and check of a state transfer")
    start_s: float = _assume(30.0, "s", "a new node's processes until they say hello")
    warmup_s: float = _assume(0.0, "s", "what the first step after a change takes longer")
    warmup_per_node_s: float = _assume(0.0, "s", "the same, added by each node")
    peer_detect_s: float = _assume(15.0, "s", "peers notice a loss by a collective's time-out")
    peer_restart_s: float = _assume(
        60.0, "s", "peers end and start all processes and communicators"
    )
    peer_reconfigure_s: float = _assume(20.0, "s", "DS(FT): time-out, new groups, state transfer")
    peer_reads_all: bool = _assume(
        False, "", "after a restart every group reads its own copy; else one reads and sends it on"
    )
    peer_padding: bool = _assume(True, "", "peers pad each exchange to the largest expert")
    snapshot_overhead: float = _assume(0.02, "of a step", "steps slowed by snapshots behind them")
    step_table_s: tuple[tuple[int, float], ...] = _assume(
        (), "s", "measured step by nodes; replaces the formulas where given"
    )

    def changed(self, figures: Mapping[str, float]) -> Costs:
        """Return a copy with some figures replaced."""
        changes: dict[str, Any] = dict(figures)
        return replace(self, **changes)

    def with_steps(self, table: tuple[tuple[int, float], ...]) -> Costs:
        """Return a copy with a table of measured step times, as (nodes, seconds) pairs."""
        return replace(self, step_table_s=tuple(sorted(table)))

    def at_pace(self, factor: float) -> Costs:
        """Return a copy in which measured steps and changes take ``factor`` times as long."""
        slower = {name: factor * getattr(self, name) for name in _CHANGES}
        table = tuple((nodes, factor * seconds) for nodes, seconds in self.step_table_s)
        return self.changed(slower).with_steps(table)

    def assumptions(self) -> list[dict[str, Any]]:
        """Return every figure with its unit and reason, for printing beside results."""
        rows = []
        for item in fields(self):
            if "unit" in item.metadata:
                rows.append({"name": item.name, "value": getattr(self, item.name), **item.metadata})
        return rows

    def to_json(self) -> str:
        """Return the profile as JSON text, in the format that ``--profile`` reads."""
        return json.dumps({"schema": 1, **asdict(self)}, indent=2) + "\n"

    def planning_s(self, shape: Shape, num_nodes: int) -> float:
        """Return the time to compute one plan."""
        return self.plan_s + self.plan_per_cell_s * shape.moe_layers * shape.experts * num_nodes

    def releasing_s(self, num_nodes: int) -> float:
        """Return the time until the surviving nodes have left their collectives."""
        return self.release_s + self.release_per_node_s * num_nodes

    def aligning_s(self, num_nodes: int) -> float:
        """Return the time until all nodes have agreed on a step."""
        return self.align_s + self.align_per_node_s * num_nodes

    def warming_s(self, num_nodes: int) -> float:
        """Return the additional time of the first step after a change."""
        return self.warmup_s + self.warmup_per_node_s * num_nodes

    def grouping_s(self, num_nodes: int) -> float:
        """Return the time to create new communicators."""
        return self.groups_s + self.groups_per_node_s * num_nodes

    def checkpoint_s(self, num_bytes: float) -> float:
        """Return the time to write to, or read from, storage."""
        return num_bytes / self.storage_bytes_per_s

    def table_step_s(self, num_nodes: int) -> float | None:
        """Return the measured step time, interpolated between sizes; None without a table."""
        if not self.step_table_s:
            return None
        sizes, seconds = zip(*sorted(self.step_table_s), strict=True)
        return float(np.interp(num_nodes, sizes, seconds))


# Source: data sheets and the testbeds that the papers describe; efficiencies are assumptions.
PROFILES: Mapping[str, Costs] = MappingProxyType(
    {
        "h200-8x400g": Costs(),
        "rtx3090-100g": Costs(
            name="rtx3090-100g",
            flops_per_s=71e12 * 0.25,  # with the next: 45 and 34 samples/s of GPT-M, as published
            net_bytes_per_s=6.25e9 * 0.85,
            storage_bytes_per_s=0.625e9,  # NFS at 50 % of 10 Gbps
            memory_bytes_per_s=0.8e12,
            peer_reads_all=True,
            peer_restart_s=60.0,
        ),
        "a800-8x200g": Costs(
            name="a800-8x200g",
            flops_per_s=8 * 312e12 * 0.20,
            net_bytes_per_s=8 * 25e9 * 0.8,
            storage_bytes_per_s=10e9,
            memory_bytes_per_s=8 * 1.6e12,
        ),
    }
)


def read_profile(text: str) -> Costs:
    """Return a profile by name, or read one from a file that ``lazarus calibrate`` wrote.

    Raises:
        ConfigError: There is no such name or file, or the file does not hold a profile.
    """
    if text in PROFILES:
        return PROFILES[text]
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"no profile {text!r}: no such file; known names: {', '.join(PROFILES)}")
    try:
        data = parse_object(read_text(path))
        data.pop("schema")
        data.pop("host_copy_bytes_per_s", None)  # in older profiles; nothing depended on it
        table = tuple((int(n), float(s)) for n, s in data.pop("step_table_s", ()))
        costs = Costs(**data, step_table_s=table)
        _check(costs)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as problem:
        raise ConfigError(f"{path} holds no cost profile: {problem}") from problem
    return costs


def _check(costs: Costs) -> None:
    for name, value in asdict(costs).items():
        if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number >= 0")
    for name in ("flops_per_s", "net_bytes_per_s", "storage_bytes_per_s", "memory_bytes_per_s"):
        if getattr(costs, name) <= 0:
            raise ValueError(f"{name} must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """Duration of one step, divided into parts, in seconds."""

    compute: float
    exchange: float
    expert_sync: float
    dense_sync: float
    fixed: float
    mode: str = ""

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.expert_sync + self.dense_sync + self.fixed


def replicated_step(
    costs: Costs, shape: Shape, plan: Plan, load_LE: Floats, *, tokens: float
) -> StepParts:
    """Return the duration of a step on a plan with replicas, in home or spread mode if faster.

    Args:
        costs: The cost model.
        shape: The model.
        plan: The plan.
        load_LE: Share of each layer's routed copies per expert, [L, E]; rows sum to 1.
        tokens: Tokens of the global batch.
    """
    nodes = plan.num_nodes
    if (measured := costs.table_step_s(nodes)) is not None:
        return StepParts(compute=measured, exchange=0, expert_sync=0, dense_sync=0, fixed=0)
    spread_ratio = float((plan.loads_of_nodes(load_LE).max(1) * nodes).mean())
    home_ratio = float((_home_loads(plan, load_LE).max(1) * nodes).mean())
    held = (plan.expert_of_slot >= 0).reshape(plan.num_layers, nodes, -1).sum(2)
    replicas = plan.replicas.astype(np.float64)
    part = float(((replicas - 1) / replicas).mean())
    record = shape.expert_params * costs.wire_bytes
    layers = shape.moe_layers
    spread_bytes = layers * float(held.max(1).mean()) * 2 * part * record
    home_bytes = layers * _home_traffic(plan, held) * record
    both = [
        _parts(costs, shape, nodes=nodes, tokens=tokens, ratio=ratio, sync=sync, mode=mode)
        for ratio, sync, mode in (
            (home_ratio, home_bytes, "home"),
            (spread_ratio, spread_bytes, "spread"),
        )
    ]
    return min(both, key=lambda parts: parts.total)


def _home_loads(plan: Plan, load_LE: Floats) -> Floats:
    """Share of each layer's routed copies that each node serves in home mode, [L, N]."""
    node_LE = plan.home // plan.ranks_per_node
    loads = np.zeros((plan.num_layers, plan.num_nodes))
    for layer in range(plan.num_layers):
        loads[layer] = np.bincount(node_LE[layer], weights=load_LE[layer], minlength=plan.num_nodes)
    return loads


def _home_traffic(plan: Plan, held_LN: Any) -> float:
    """Expert gradients that the busiest node sends or receives in home mode, mean over layers.

    The home of an expert sends its gradient to every other replica.
    """
    node_LE = plan.home // plan.ranks_per_node
    busiest = []
    for layer in range(plan.num_layers):
        homes = np.bincount(node_LE[layer], minlength=plan.num_nodes)
        sent = np.bincount(
            node_LE[layer], weights=plan.replicas[layer] - 1.0, minlength=plan.num_nodes
        )
        busiest.append(max(float(sent.max()), float((held_LN[layer] - homes).max())))
    return float(np.mean(busiest))


def _parts(
    costs: Costs, shape: Shape, *, nodes: int, tokens: float, ratio: float, sync: float, mode: str,
    pad: float = 1.0, held: float = 0.0,
) -> StepParts:  # fmt: skip
    """Compute the duration of a step from the busiest node.

    Args:
        ratio: Routed copies on the busiest node over the mean, averaged over layers.
        sync: Bytes of expert gradients that the busiest node moves.
        pad: Factor on the bytes of an exchange.
        held: Expert parameters per node, for the optimizer; 0: those of one replica per expert.
    """
    mine = tokens / nodes
    copies = mine * shape.top_k * shape.moe_layers
    flops = mine * shape.dense_flops + ratio * copies * 6.0 * shape.expert_params
    params = held or shape.moe_layers * shape.experts * shape.expert_params / nodes
    update = (shape.dense_params + params) * 2 * shape.state_bytes / costs.memory_bytes_per_s
    latency = costs.latency_s + costs.latency_per_node_s * nodes
    away = (nodes - 1) / nodes
    moved = 4 * copies * ratio * pad * shape.dim * costs.wire_bytes * away
    dense = 2 * away * shape.dense_params * costs.wire_bytes
    return StepParts(
        compute=flops / costs.flops_per_s + update,
        exchange=moved / costs.net_bytes_per_s + 4 * shape.moe_layers * latency,
        expert_sync=sync / costs.net_bytes_per_s,
        dense_sync=dense / costs.net_bytes_per_s + latency,
        fixed=costs.step_fixed_s,
        mode=mode,
    )


def grouped_step(
    costs: Costs, shape: Shape, load_LE: Floats, *, nodes: int, group: int, tokens: float
) -> StepParts:
    """Return the duration of a step of fixed expert parallelism.

    Each group of ``group`` nodes holds every expert once, and groups sum their expert gradients.
    With ``costs.peer_padding`` exchanges are padded to the largest expert.
    """
    if (measured := costs.table_step_s(nodes)) is not None:
        return StepParts(compute=measured, exchange=0, expert_sync=0, dense_sync=0, fixed=0)
    experts = load_LE.shape[1]
    bounds = [round(i * experts / group) for i in range(group + 1)]
    sums = np.stack([load_LE[:, a:b].sum(1) for a, b in pairwise(bounds)])
    ratio = float((sums.max(0) * group).mean())
    pad = float((load_LE.max(1) * experts).mean()) / ratio if costs.peer_padding else 1.0
    copies = nodes // group
    held = shape.moe_layers * shape.experts * shape.expert_params / group
    sync = 2 * (copies - 1) / copies * held * costs.wire_bytes
    return _parts(
        costs, shape, nodes=nodes, tokens=tokens, ratio=ratio, sync=sync, mode="ep",
        pad=max(1.0, pad), held=held,
    )  # fmt: skip

"""Sections that say how a run is carried out: each key with type, default, range and meaning.

``training_sections.py`` has those that say what is trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lazarus.config.layers import require, setting
from lazarus.errors import ConfigError, Problem
from lazarus.faults import ChaosSpec, FaultSpec, parse_chaos, parse_fault

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the record goes, and what it holds."""

    SECTION: ClassVar[str] = "run"

    dir: str = setting(
        "runs/{time}-{name}", "folder of the record; `{time}` and `{name}` are filled in"
    )
    name: str = setting("lazarus", "name of the run")
    seed: int = setting(0, "of weights, samples and every random draw", ge=0)
    digest_every: int = setting(0, "steps between state digests; 0: at the end only", ge=0)
    ledger: bool = setting(False, "record the sample ids of each committed step")

    def __post_init__(self) -> None:
        require(self, (bool(self.dir.strip()), "dir", "run.dir is empty"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """How many nodes, and what each gives to the run."""

    SECTION: ClassVar[str] = "cluster"

    nodes: int = setting(4, "nodes wanted; lost nodes are replaced up to `cluster.nodes`", ge=1)
    min_nodes: int = setting(1, "quorum: with fewer, the state is held until nodes come", ge=1)
    max_nodes: int | None = setting(None, "none: whoever comes is taken", ge=1)
    replace_lost: bool = setting(
        True, "start lost nodes again where there is room; false: only below quorum"
    )
    ranks_per_node: int | Auto = setting("auto", "auto: the node's GPUs, else 1", ge=1)
    cpus_per_rank: float = setting(1.0, "CPUs that Ray reserves for a rank", gt=0)
    memory_per_rank: str | None = setting(None, 'host memory that Ray reserves, such as "8GiB"')
    node_labels: Mapping[str, str] = setting({}, "Ray labels that a node must have")
    address: str | None = setting(None, "Ray cluster to join; none: an embedded one")
    join_debounce_s: float = setting(2.0, "wait this long for further joiners", ge=0)
    quorum_timeout_s: float = setting(3600.0, "give up when below quorum for this long", gt=0)
    launcher: Literal["ray", "process", "cold"] = setting(
        "ray", "who starts workers; cold: each process imports torch anew", internal=True
    )

    def __post_init__(self) -> None:
        most = self.max_nodes
        require(
            self,
            (
                self.min_nodes <= self.nodes,
                "min_nodes",
                f"cluster.min_nodes={self.min_nodes} is more than cluster.nodes={self.nodes}",
            ),
            (
                most is None or self.nodes <= most,
                "max_nodes",
                f"cluster.max_nodes={most} is less than cluster.nodes={self.nodes}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Where the replicas of experts live."""

    SECTION: ClassVar[str] = "placement"

    min_replicas: int = setting(2, "floor per expert; survives any min_replicas - 1 losses", ge=1)
    slots_per_node: int | Auto = setting("auto", "auto: the floor holds after spare_losses", ge=1)
    spare_losses: int = setting(2, "further losses that auto slots provide for", ge=0)
    memory_fraction: float = setting(
        0.85, "of a node's memory that auto slots may fill", gt=0, le=1
    )
    solver: Literal["auto", "greedy", "ilp"] = setting("auto", "ilp: PuLP, at planned moments only")
    policy: str | None = setting(
        None, "own policy: `package.module:Name`, or an entry point's name"
    )
    resilience_weight: float = setting(1.0, "survival against balance", ge=0)
    domains: Literal["node", "zone"] = setting(
        "node", "what fails together; zone: Ray label `ray.io/availability-zone`"
    )
    max_plan_ms: float = setting(
        1000.0, "limit of an own policy and of ilp; then the greedy plan", gt=0
    )

    def __post_init__(self) -> None:
        require(self, _named(self.policy, "placement.policy"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How tokens reach their experts."""

    SECTION: ClassVar[str] = "dispatch"

    mode: Literal["auto", "home", "balanced", "shares"] = setting(
        "auto",
        "home: an expert's tokens go to one replica; balanced: to several where that pays; shares: "
        "as the plan says; auto: home where ranks share CPUs, balanced with a device for each",
    )
    rows_per_replica: float | None = setting(
        None,
        "balanced: rows that take as long as sending one expert's gradient; none: 128 on CPUs, "
        "2048 with a device for each rank",
        ge=0,
    )
    ranks_per_device: float = setting(
        1.0, "balanced: ranks that share one device, or one core where they have none", ge=1
    )
    overlap: Literal["auto", "on", "off"] = setting(
        "auto",
        "sum gradients during the backward, dense ones in buckets, experts' layer by layer; auto: "
        "where a rank has its own device",
    )
    transport: Literal["auto", "group"] = setting(
        "auto", "auto: shared memory between CPU ranks of one machine; group: gloo or NCCL"
    )

    def __post_init__(self) -> None:
        require(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig:
    """When something counts as lost, and what happens then."""

    SECTION: ClassVar[str] = "recovery"

    tolerated_stall_s: float = setting(10.0, "**the** time-out; all others derive from it", ge=0.5)
    on_lost_expert: Literal["partial", "rollback", "fail"] = setting(
        "partial", "no live replica left: restore that expert alone, everything, or stop"
    )
    heal: Literal["auto", "before", "behind"] = setting(
        "auto", "refill lost replicas before training goes on, or between its steps"
    )
    compare_every: int = setting(
        0, "steps between comparisons of all replicas, bit for bit; 0: none", ge=0
    )
    on_mismatch: Literal["repair", "stop"] = setting(
        "repair",
        "replicas differ: take what the others outvote from them (without a majority: from the "
        "newest checkpoint), or end the run",
    )
    policy: str | None = setting(
        None, "own policy: `package.module:Name`, or an entry point's name"
    )

    def __post_init__(self) -> None:
        require(self, _named(self.policy, "recovery.policy"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Partial expert checkpoints."""

    SECTION: ClassVar[str] = "checkpoint"

    url: str | None = setting(None, "any fsspec URL; none: `{run.dir}/checkpoints`")
    every: int | Auto = setting(
        200, "steps between checkpoints; auto: as often as storage keeps up; 0: none", ge=0
    )
    k_snapshot: int | Auto = setting("auto", "experts per layer copied to host memory", ge=1)
    k_persist: int | Auto = setting("auto", "experts per layer written to storage", ge=1)
    select: Literal["sequential", "load", "full"] = setting("sequential", "which experts come next")
    parts: Literal["WO", "W", "O"] = setting("WO", "partial for weights, optimizer state, or both")
    plt_budget: float = setting(0.0375, "portion of lost tokens that is accepted", gt=0, le=1)
    keep: int = setting(3, "checkpoints kept", ge=1)
    full_at_end: bool = setting(True, "the last checkpoint of a run has every expert")
    copies: int = setting(1, "copies of a snapshot on other nodes", ge=0)

    def __post_init__(self) -> None:
        both = isinstance(self.k_persist, int) and isinstance(self.k_snapshot, int)
        fits = not both or int(self.k_persist) <= int(self.k_snapshot)
        message = (
            f"checkpoint.k_persist={self.k_persist} is more than "
            f"checkpoint.k_snapshot={self.k_snapshot}"
        )
        require(self, (fits, "k_persist", message))


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Who is told about progress."""

    SECTION: ClassVar[str] = "metrics"

    prometheus: bool = setting(True, "`lazarus train`: figures through Ray's metrics")
    tensorboard: bool = setting(False, "`lazarus train`: event files below `{run.dir}/tensorboard`")
    wandb_project: str | None = setting(None, "`lazarus train`: project at Weights & Biases")
    progress: Literal["auto", "line", "json", "off"] = setting("auto", "auto: redraw on a terminal")
    on_callback_error: Literal["warn", "fail"] = setting("warn", "when a callback raises")
    report: bool = setting(True, "write `report.html` and `expert_load.npz` when the run ends")

    def __post_init__(self) -> None:
        require(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """Who may connect."""

    SECTION: ClassVar[str] = "security"

    bind: str = setting(
        "auto", "loopback when embedded, else the node's Ray address; `0.0.0.0`: all addresses"
    )
    tls: bool = setting(False, "TLS on the control plane")
    cert: str | None = setting(None, "certificate file, PEM")
    key: str | None = setting(None, "private key file, PEM")
    ca: str | None = setting(None, "certificate authority file, PEM")
    tls_name: str | None = setting(
        None, "name that the certificate carries; none: it carries every address"
    )
    secret_file: str | None = setting(
        None, "file of the job's secret, readable by its owner alone; none: random per job"
    )

    def __post_init__(self) -> None:
        missing = [n for n in ("cert", "key", "ca") if self.tls and getattr(self, n) is None]
        text = f"security.tls needs {', '.join(f'security.{n}' for n in missing)} too"
        require(self, (not missing, "tls", text))


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """Faults on purpose; only processes of this very run are touched."""

    SECTION: ClassVar[str] = "faults"

    specs: tuple[str, ...] = setting((), "`KIND[:NODE]@STEP[/PHASE][,key=value]...`")
    chaos: str | None = setting(None, "random faults, `mtbf=30s,seed=1,kinds=kill+join`")

    def __post_init__(self) -> None:
        require(self)
        problems = _failures(parse_fault, self.specs, "faults.specs")
        problems += _failures(parse_chaos, (self.chaos,) if self.chaos else (), "faults.chaos")
        if problems:
            raise ConfigError(problems)

    def parsed(self) -> tuple[FaultSpec, ...]:
        """The scripted faults."""
        return tuple(parse_fault(text) for text in self.specs)

    def parsed_chaos(self) -> ChaosSpec | None:
        """The random ones."""
        return parse_chaos(self.chaos) if self.chaos else None


def _named(policy: str | None, name: str) -> tuple[bool, str, str]:
    words = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
    fine = policy is None or re.fullmatch(rf"{words}:{words}|[\w.-]+", policy) is not None
    wanted = 'must be "package.module:Name" or the name of an entry point'
    return fine, name.split(".")[1], f'{name} = "{policy}" {wanted}'


def _failures(read: Callable[[str], object], texts: Iterable[str], name: str) -> list[Problem]:
    problems = []
    for text in texts:
        try:
            read(text)
        except ConfigError as error:
            problems += [Problem(p.message, key=name) for p in error.problems]
    return problems

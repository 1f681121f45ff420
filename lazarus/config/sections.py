"""The sections of a configuration: every key with its type, default, range and meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lazarus.config.layers import require, setting
from lazarus.config.presets import MODEL_SHAPES
from lazarus.errors import ConfigError, Problem
from lazarus.faults import ChaosSpec, FaultSpec, parse_chaos, parse_fault

Auto = Literal["auto"]
_TINY = MODEL_SHAPES["tiny"]


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
class ModelConfig:
    """The shape of the built-in GPT-MoE; not read when the model is given in Python."""

    SECTION: ClassVar[str] = "model"

    preset: Literal["tiny", "gpt-s", "gpt-m", "gpt-l"] | None = setting(None, "a named shape")
    layers: int = setting(_TINY["layers"], "transformer blocks", ge=1)
    dim: int = setting(_TINY["dim"], "width of the residual stream", ge=1)
    heads: int = setting(_TINY["heads"], "attention heads; divides dim", ge=1)
    vocab: int = setting(_TINY["vocab"], "token ids; 256 for bytes of text", ge=2)
    seq_len: int = setting(_TINY["seq_len"], "tokens of a sample", ge=1)
    experts: int = setting(_TINY["experts"], "experts of each MoE layer", ge=1)
    top_k: int = setting(_TINY["top_k"], "experts that a token is sent to", ge=1)
    ffn_mult: int = setting(_TINY["ffn_mult"], "hidden width of an expert / dim", ge=1)
    moe_every: int = setting(_TINY["moe_every"], "every n-th block has experts", ge=1)

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.dim % self.heads == 0,
                "heads",
                f"model.heads={self.heads} does not divide model.dim={self.dim}",
            ),
            (
                self.top_k <= self.experts,
                "top_k",
                f"model.top_k={self.top_k} is more than model.experts={self.experts}",
            ),
            (
                self.moe_every <= self.layers,
                "moe_every",
                f"model.moe_every={self.moe_every} leaves no MoE layer among "
                f"model.layers={self.layers}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read; who reads which sample is decided by the run alone."""

    SECTION: ClassVar[str] = "data"

    path: str | None = setting(
        None, "text file, folder, `.npy` or `.bin` tokens; none: Python's sources"
    )
    seq_len: int | None = setting(None, "none: `model.seq_len`", ge=1)
    num_shards: int = setting(64, "shards of a stream; fixed for the run's life", ge=1)
    shuffle_shards: bool = setting(False, "read a stream's shards in an order drawn from the seed")
    prefetch_steps: int = setting(2, "steps read ahead; prefetched is not consumed", ge=0)
    split: float = setting(
        0.99, "part of the text that is trained on; the rest is held out", gt=0, le=1
    )

    def __post_init__(self) -> None:
        require(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The training loop."""

    SECTION: ClassVar[str] = "train"

    steps: int = setting(1000, "steps to commit", ge=1)
    global_batch: int = setting(32, "samples of every step, whatever the number of ranks", ge=1)
    micro_batch_size: int = setting(4, "the most samples of a rank in one round", ge=1)
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16 keeps fp32 masters and moments")
    recompute: bool = setting(False, "recompute activations in the backward pass")
    on_nonfinite: Literal["skip", "stop"] = setting(
        "skip",
        "a step whose loss or gradient norm is not finite: leave its update out, until ten in a "
        "row end the run, or end the run at once",
    )
    scratch_buffers: tuple[str, ...] = setting(
        (),
        "names or patterns (`blocks.*.seen`) of persistent buffers that are each rank's own: never "
        "averaged, compared, sent or saved",
    )

    def __post_init__(self) -> None:
        require(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule, unless the optimizer is given in Python."""

    SECTION: ClassVar[str] = "optim"

    lr: float = setting(3e-4, "peak learning rate", gt=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates")
    eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = setting(0.1, "of matrices; vectors are not decayed", ge=0)
    clip_norm: float = setting(1.0, "global gradient norm; 0 turns clipping off", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "learning rate over steps")
    warmup_steps: int = setting(100, "linear warm-up", ge=0)
    min_lr_ratio: float = setting(0.1, "last learning rate / lr", ge=0, le=1)

    def __post_init__(self) -> None:
        require(
            self,
            (
                all(0 <= beta < 1 for beta in self.betas),
                "betas",
                f"optim.betas={list(self.betas)} must lie in [0, 1)",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Held-out loss."""

    SECTION: ClassVar[str] = "eval"

    every: int = setting(0, "steps between evaluations; 0: none", ge=0)
    batches: int = setting(16, "global batches of an evaluation", ge=1)

    def __post_init__(self) -> None:
        require(self)


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

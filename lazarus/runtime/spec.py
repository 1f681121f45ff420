"""What the driver is given and hands to processes. Secrets travel here, never in an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazarus.control.state import ControlConfig
from lazarus.faults import ChaosSpec
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.timeouts import Timeouts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything the driver needs to start a run's processes."""

    run_id: str
    run_dir: Path
    scratch: Path
    config: Mapping[str, Any]
    control: ControlConfig
    timeouts: Timeouts
    user: bytes
    faults: tuple[str, ...]
    checkpoint_url: str
    resume: str | None
    version: str
    ranks_per_node: int
    credentials: Credentials
    checkpoint: Mapping[str, Any]
    lives: tuple[str, ...] = ()  # ids of the runs that this one continues, and its own
    keep_checkpoints: int = 3
    keepers: bool = True  # one per node, for snapshots
    journal: str = "journal"
    replace_lost: bool = True  # up to control.nodes
    chaos: ChaosSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """The user's functions, as they run in workers. ``None`` means the shipped one."""

    model: Callable[..., Any] | None = None
    data: Any = None
    eval_data: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    loss: Callable[..., Any] | None = None
    optimizer: Callable[..., Any] | None = None
    schedule: Callable[[int], float] | None = None
    hooks: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """One rank's process."""

    run_id: str
    worker: str
    node_key: str
    local_rank: int
    ranks_per_node: int
    host: str
    controller: str  # where it listens
    credentials: Credentials
    config: Mapping[str, Any]  # TrainConfig.to_dict()
    user: bytes  # cloudpickled UserCode, made by this run's driver
    run_dir: Path
    node_folder: Path  # scratch folder that names the node's processes
    faults: tuple[str, ...] = ()
    keeper: str = ""
    zone: str = ""
    memory_share: float = 1.0
    resume: str | None = None  # "url step" of the checkpoint that the run starts from
    checkpoint_url: str = ""
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSpec:
    """The controller's process."""

    run_id: str
    host: str  # where others reach it
    port: int  # 0: any; a restarted controller takes the old one
    credentials: Credentials
    run_dir: Path
    config: ControlConfig
    checkpoint_url: str = ""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    lives: tuple[str, ...] = ()  # ids of the runs that this one continues, and its own
    keep_checkpoints: int = 3
    journal: str = "journal"  # folder below run_dir; one for each life of the run
    bind_host: str = ""  # what it listens on; empty: host
    max_streams: int = 4096

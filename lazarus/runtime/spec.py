"""What the driver is given and hands to processes. Secrets travel here, never in an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.config.train_config import TrainConfig
from lazarus.control.cluster.state import ControlConfig
from lazarus.runtime.rpc.credentials import Credentials


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything the driver needs to start a run's processes.

    Attributes:
        config: Of the run, as its record has it.
        control: What the controller is told of it, and of this run.
        user: The cloudpickled ``UserCode``.
        scratch: Folder for what ends with the run.
        decisive: What of the configuration decides the mathematics; every manifest carries it.
        lives: Ids of the runs that this one continues, and its own.
        journal: Folder below ``run_dir``; one for each life of the run.
    """

    config: TrainConfig
    control: ControlConfig
    user: bytes
    run_dir: Path
    scratch: Path
    credentials: Credentials
    decisive: Mapping[str, Any]
    lives: tuple[str, ...]
    journal: str

    @property
    def resume(self) -> CheckpointRef | None:
        """The checkpoint that the run starts from."""
        control = self.control
        return None if control.resume is None else CheckpointRef(control.resume, control.start_step)


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
    config: TrainConfig
    user: bytes  # cloudpickled UserCode, made by this run's driver
    node_folder: Path  # scratch folder that names the node's processes
    faults: tuple[str, ...] = ()
    keeper: str = ""
    zone: str = ""
    memory_share: float = 1.0
    resume: CheckpointRef | None = None  # that the run starts from
    checkpoint_url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSpec:
    """The controller's process."""

    config: ControlConfig
    host: str  # where others reach it
    port: int  # 0: any; a restarted controller takes the old one
    credentials: Credentials
    run_dir: Path
    decisive: Mapping[str, Any] = field(default_factory=dict)  # see ``RunSpec``
    lives: tuple[str, ...] = ()  # ids of the runs that this one continues, and its own
    keep_checkpoints: int = 3
    journal: str = "journal"  # folder below run_dir; one for each life of the run
    bind_host: str = ""  # what it listens on; empty: host

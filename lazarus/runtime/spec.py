"""Specs that start the driver, a worker or the controller.

Secrets are passed in these objects, never in environment variables.
"""

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
        config: The run's configuration, as written to its record.
        control: The controller's part of the configuration, with this run's id and start step.
        user: The cloudpickled ``UserCode``.
        run_dir: Folder of the run's journal and record.
        scratch: Folder for files that are not needed after the run.
        credentials: Secret and certificate shared by the run's processes.
        decisive: Settings that affect the numerical result; stored in every manifest.
        lives: Ids of the runs that this run continues, and its own id.
        journal: Name of the journal's folder in ``run_dir``; a resumed run uses a new one.
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
    """The user's functions, called in workers. ``None`` selects the default that Lazarus ships."""

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
    """Everything that one worker process (one rank) needs to start."""

    run_id: str
    worker: str
    node_key: str
    local_rank: int
    ranks_per_node: int
    host: str
    controller: str  # the controller's address, "host:port"
    credentials: Credentials
    config: TrainConfig
    user: bytes  # cloudpickled UserCode, made by this run's driver
    node_folder: Path  # scratch folder with a file for each process of the node
    faults: tuple[str, ...] = ()
    keeper: str = ""  # address of the node's keeper; empty: none
    zone: str = ""  # availability zone; empty: unknown
    memory_share: float = 1.0  # see ``NodePlace``
    resume: CheckpointRef | None = None  # the checkpoint that the run starts from
    checkpoint_url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSpec:
    """Everything that the controller process needs to start."""

    config: ControlConfig
    host: str  # address at which other processes reach the controller
    port: int  # 0: any free port; a restarted controller gets the port it had before
    credentials: Credentials
    run_dir: Path
    decisive: Mapping[str, Any] = field(default_factory=dict)  # see ``RunSpec``
    lives: tuple[str, ...] = ()  # see ``RunSpec``
    keep_checkpoints: int = 3
    journal: str = "journal"  # see ``RunSpec``
    bind_host: str = ""  # address that the controller listens on; empty: ``host``

"""The Ray actors of a run: one class each for a rank, the controller and a node's keeper."""

from __future__ import annotations

import os
from pathlib import Path

from lazarus.basics.threads import spawn
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.local_nodes import LocalNodes, NodePlace
from lazarus.runtime.spec import ControllerSpec, WorkerSpec


class WorkerActor:
    """One rank, which trains until ``run`` returns."""

    def warm_up(self) -> None:
        """Import the modules that a rank needs."""
        import lazarus.runtime.worker.process  # noqa: F401

    def is_there(self) -> None:
        """Do nothing; the answer shows that the actor has a process."""

    def run(self, spec: WorkerSpec) -> int:
        """Train until the rank is done. Returns its exit code."""
        from lazarus.runtime.worker.process import run_worker

        return run_worker(spec)


class ControllerActor:
    """One controller. After its death the driver starts another, which reads the journal."""

    def __init__(self, spec: ControllerSpec) -> None:
        from lazarus.runtime.controller.shell import open_controller

        self._controller = open_controller(spec)
        self._death: BaseException | None = None
        self._thread = spawn("controller", self._controller.run, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        self._death = problem

    def place(self) -> tuple[int, int]:
        """The port that the controller listens on, and its process id."""
        return int(self._controller.port), os.getpid()

    def wait(self) -> None:
        """Wait until the controller's thread ends.

        Raises:
            Exception: The error that ended the controller, if any.
        """
        self._thread.join()
        if self._death is not None:
            raise self._death


class NodeActor:
    """Starts and ends the keeper of one node, on the node's machine; both end together."""

    def __init__(self, host: str, bind_host: str) -> None:
        self._nodes = LocalNodes(host, bind_host=bind_host)

    def open(self, key: str, keeper: KeeperConfig | None, folder: Path) -> NodePlace:
        """Make the node's folder, start its keeper, and add this process to the node."""
        place = self._nodes.open(key, keeper=keeper, folder=folder)
        self._nodes.note(key)
        return place

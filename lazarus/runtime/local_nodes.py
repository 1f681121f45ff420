"""The nodes of a run that live on this machine, apart from their ranks: folder and keeper."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lazarus.runtime.keeper import KeeperConfig, KeeperProcess, start_keeper


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """Where one node of the run lives."""

    host: str  # the address that its processes bind to, and are reached at
    keeper: str = ""  # address of its keeper of snapshots; empty: it has none


class LocalNodes:
    """Owns the keepers of this machine: they end with this process, or before."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._keepers: dict[str, KeeperProcess] = {}
        self._folders: dict[str, Path] = {}

    def open(self, key: str, *, keeper: KeeperConfig | None, folder: Path) -> NodePlace:
        """Make the node's folder and start its keeper.

        Raises:
            KeeperUnavailableError: It did not start.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._folders[key] = folder
        if keeper is None:
            return NodePlace(host=self._host)
        started = start_keeper(replace(keeper, bind=f"{self._host}:0"))
        (folder / str(started.process.pid)).touch()
        with self._lock:
            self._keepers[key] = started
        return NodePlace(host=self._host, keeper=started.address)

    def note(self, key: str, pid: int = 0) -> None:
        """A process (this one) belongs to the node: a fault that ends the node ends it too."""
        with self._lock:
            folder = self._folders[key]
        (folder / str(pid or os.getpid())).touch()

    def close(self, key: str) -> None:
        """End the keeper, remove the folder. Fine if the node is gone already."""
        with self._lock:
            keeper = self._keepers.pop(key, None)
            folder = self._folders.pop(key, None)
        if keeper is not None:
            keeper.process.kill()
            keeper.stop()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close_all(self) -> None:
        with self._lock:
            keys = tuple(self._folders)
        for key in keys:
            self.close(key)
